#include "checker.h"

#include <algorithm>
#include <cstring>

#include "memory.h"
#include "symbols.h"

extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[],
    _end[]; // of this object, by the linker

namespace msl::checker {

namespace {

constexpr uint64_t kGap =
    64 * 1024; // between buffers: what runs over the end of one is in no other
enum { kDevice = 1, kThreadgroup = 2 }; // bits of mem_flags

struct State {
  std::vector<Region> regions; // by buffer number, resident ones behind
  std::vector<Block> blocks;
  std::vector<Block> variables;   // of the current threadgroup
  std::vector<std::string> names; // of the variables
  uint64_t stacks_begin = 0, stacks_end = 0;
  uint32_t threadgroup = 0;                   // a running number
  uint16_t group_epoch[2], simd_epoch[2][32]; // [0] device, [1] threadgroup memory
  Block* last = nullptr;
  bool on = false;
};
State state;

Moment now(bool threadgroup_memory) {
  const uint32_t lane = msl_self->thread_index, simd = msl_self->simdgroup;
  return {state.threadgroup, static_cast<uint16_t>(lane), state.group_epoch[threadgroup_memory],
          state.simd_epoch[threadgroup_memory][simd]};
}

// Whether `before` is known to have happened before `after`, or is the same thread's.
bool ordered(const Moment& before, const Moment& after) {
  if (before.threadgroup != after.threadgroup)
    return false;
  if (before.thread == after.thread || before.group_epoch != after.group_epoch)
    return true;
  return before.thread / kSimdWidth == after.thread / kSimdWidth &&
         before.simd_epoch != after.simd_epoch;
}

int distance(const Moment& a, const Moment& b) {
  if (a.threadgroup != b.threadgroup)
    return 3;
  if (a.thread / kSimdWidth != b.thread / kSimdWidth)
    return 2;
  return a.thread != b.thread;
}

void note_read(Byte& byte, const Moment& m, bool atomic) {
  int slot;
  if (byte.reads == 0 || ordered(byte.read[0], m)) {
    slot = 0;
  } else if (byte.reads == 1 || ordered(byte.read[1], m) ||
             distance(byte.read[0], m) > distance(byte.read[0], byte.read[1])) {
    slot = 1;
  } else {
    return;
  }
  byte.read[slot] = m;
  byte.read_atomic[slot] = atomic;
  byte.reads = std::max<uint8_t>(byte.reads, slot + 1);
}

struct Access {
  uint64_t address, size;
  bool write, atomic;
  uint64_t pc;
  const msl_site* site;
};

std::string described(const Access& a) {
  return std::string(a.atomic ? "atomic " : "") + (a.write ? "write" : "read") + " of " +
         std::to_string(a.size) + " bytes";
}

std::string place(const Access& a) {
  return (a.site ? " in " + where(*a.site) : source_line(a.pc)) + " by " + who();
}

std::string in(uint64_t address, uint64_t begin, const std::string& name) {
  return " at byte " + std::to_string(static_cast<int64_t>(address - begin)) + " of " + name;
}

std::string other(const Moment& m, const char* verb) {
  const bool same_group = m.threadgroup == state.threadgroup;
  return std::string("; thread ") + std::to_string(m.thread) +
         (same_group ? "" : " of another threadgroup") + " " + verb + " it" +
         (same_group ? " with no barrier for this memory between" : "");
}

// Checks one byte against its history and writes the access into it.
void follow(Byte& byte, const Access& a, const Moment& m, const std::string& name, uint64_t begin,
            uint64_t address, bool must_be_written) {
  if (must_be_written && !byte.written && (!a.write || a.atomic))
    fail("read of memory that was never written: " + described(a) + in(address, begin, name) +
         place(a));
  if (byte.written && !(a.atomic && byte.write_atomic) && !ordered(byte.write, m))
    fail("race: " + described(a) + in(address, begin, name) + place(a) +
         other(byte.write, "wrote"));
  if (!a.write)
    return note_read(byte, m, a.atomic);
  for (int i = 0; i < byte.reads; i++)
    if (!(a.atomic && byte.read_atomic[i]) && !ordered(byte.read[i], m))
      fail("race: " + described(a) + in(address, begin, name) + place(a) +
           other(byte.read[i], "read"));
  byte.write = m;
  byte.written = true;
  byte.write_atomic = a.atomic;
}

bool inside(const Access& a, uint64_t begin, uint64_t end) {
  return a.address >= begin && a.address + a.size <= end;
}

void check_device(Block& block, const Access& a) {
  Region* found = block.only;
  if (!found)
    for (Region& r : state.regions)
      if (inside(a, r.begin, r.end) && (!found || (a.write && !found->writable)))
        found = &r;
  if (!found)
    return; // between two overlapping buffers: the caller reports it
  if (a.write && !found->writable)
    fail("write to memory that the kernel or its host declares const: " + described(a) +
         in(a.address, found->begin, found->name) + place(a));
  const uint64_t offset = a.address - found->begin;
  if (block.bytes) {
    const Moment m = now(false);
    for (uint64_t i = 0; i < a.size; i++)
      follow(block.bytes[a.address + i - block.begin], a, m, found->name, found->begin, a.address,
             found->unwritten);
  }
  if (a.write)
    found->written.set(offset, a.size);
  if (!a.write || a.atomic)
    found->read.set(offset, a.size);
}

void check_variable(Block& block, const Access& a) {
  const std::string& name = state.names[&block - state.variables.data()];
  const Moment m = now(true);
  for (uint64_t i = 0; i < a.size; i++)
    follow(block.bytes[a.address + i - block.begin], a, m, name, block.begin, a.address, true);
}

[[noreturn]] void out_of_bounds(const Access& a) {
  uint64_t nearest = ~uint64_t{0}, begin = 0, size = 0;
  std::string name;
  auto consider = [&](uint64_t b, uint64_t e, const std::string& n) {
    const uint64_t away = a.address < b ? b - a.address : a.address >= e ? a.address - e : 0;
    if (away >= nearest)
      return;
    nearest = away, begin = b, size = e - b, name = n;
  };
  for (const Region& r : state.regions)
    consider(r.begin, r.end, r.name);
  for (size_t i = 0; i < state.variables.size(); i++)
    consider(state.variables[i].begin, state.variables[i].end, state.names[i]);
  if (a.address < 4096)
    fail("out of bounds: " + described(a) + " through a null pointer" + place(a));
  if (nearest > kGap)
    fail("out of bounds: " + described(a) + " far from any buffer" + place(a));
  fail("out of bounds: " + described(a) + in(a.address, begin, name) + ", which has " +
       std::to_string(size) + place(a));
}

void check(const Access& a) {
  if (!state.on || !msl_self)
    return;
  if (inside(a, state.stacks_begin, state.stacks_end))
    return;
  if (state.last && inside(a, state.last->begin, state.last->end))
    return check_device(*state.last, a);
  for (Block& v : state.variables)
    if (inside(a, v.begin, v.end))
      return check_variable(v, a);
  auto next = std::upper_bound(state.blocks.begin(), state.blocks.end(), a.address,
                               [](uint64_t address, const Block& b) { return address < b.begin; });
  if (next != state.blocks.begin() && inside(a, (next - 1)->begin, (next - 1)->end)) {
    state.last = &*(next - 1);
    return check_device(*state.last, a);
  }
  if (inside(a, reinterpret_cast<uint64_t>(__ehdr_start), reinterpret_cast<uint64_t>(_end)))
    return;
  out_of_bounds(a);
}

Block make_block(uint64_t begin, uint64_t end, bool shared) {
  Block b{begin, end, {}, nullptr, {}, nullptr};
  if (shared) {
    b.byte_pages = Pages((end - begin) * sizeof(Byte) + 1);
    b.bytes = reinterpret_cast<Byte*>(b.byte_pages.data());
  }
  return b;
}

// Gives [original, original + size) memory of its own with gaps around, at the same offset in 256
// bytes.
Block moved(uint64_t original, uint64_t size, bool shared) {
  Pages storage(size + 2 * kGap + 512);
  const uint64_t base = reinterpret_cast<uint64_t>(storage.data()) + kGap;
  Block b = make_block(base + original % 256, base + original % 256 + size, shared);
  memcpy(reinterpret_cast<void*>(b.begin), reinterpret_cast<void*>(original), size);
  b.storage = std::move(storage);
  return b;
}

Region make_region(const msl_buffer& buffer, std::string name, bool writable) {
  const auto begin = reinterpret_cast<uint64_t>(buffer.data);
  const uint64_t size = buffer.data ? buffer.size : 0;
  return {begin,
          begin + size,
          std::move(name),
          writable && !(buffer.flags & MSL_READ_ONLY),
          (buffer.flags & MSL_UNWRITTEN) != 0,
          Touched(size),
          Touched(size)};
}

void move_region(Region& r, uint64_t by) {
  r.begin += by;
  r.end += by;
  if (r.unwritten && by)
    memset(reinterpret_cast<void*>(r.begin), 0xFF, r.end - r.begin);
}

void make_regions(const msl_dispatch& d, const msl_kernel_entry& kernel) {
  state.regions.clear();
  for (uint32_t n = 0; n < d.buffer_count; n++) {
    std::string name = "buffer(" + std::to_string(n) + ")";
    bool writable = true;
    for (uint32_t i = 0; i < kernel.parameter_count; i++) {
      const msl_parameter& p = kernel.parameters[i];
      if (p.index != n)
        continue;
      name += std::string(" '") + p.name + "'";
      writable = !p.is_const;
    }
    state.regions.push_back(make_region(d.buffers[n], name, writable));
  }
  for (uint32_t n = 0; n < d.resident_count; n++)
    state.regions.push_back(
        make_region(d.resident[n], "resident(" + std::to_string(n) + ")", true));
}

// Overlapping buffers stay together. What pointers in other buffers lead to (the resident ones)
// can't be moved.
void make_blocks(const msl_dispatch& d) {
  state.blocks.clear();
  std::vector<uint32_t> order;
  for (uint32_t i = 0; i < state.regions.size(); i++)
    if (state.regions[i].begin != state.regions[i].end)
      order.push_back(i);
  std::sort(order.begin(), order.end(),
            [](uint32_t a, uint32_t b) { return state.regions[a].begin < state.regions[b].begin; });
  for (size_t i = 0, j; i < order.size(); i = j) {
    const uint64_t begin = state.regions[order[i]].begin;
    uint64_t end = begin;
    bool shared = false, in_place = false;
    for (j = i; j < order.size() && (j == i || state.regions[order[j]].begin < end); j++) {
      end = std::max(end, state.regions[order[j]].end);
      shared |= state.regions[order[j]].writable;
      in_place |= order[j] >= d.buffer_count;
    }
    Block block = in_place ? make_block(begin, end, shared) : moved(begin, end - begin, shared);
    if (j == i + 1)
      block.only = &state.regions[order[i]];
    for (size_t k = i; k < j; k++)
      move_region(state.regions[order[k]], block.begin - begin);
    state.blocks.push_back(std::move(block));
  }
  std::sort(state.blocks.begin(), state.blocks.end(),
            [](const Block& a, const Block& b) { return a.begin < b.begin; });
}

} // namespace

void begin(const msl_dispatch& d, const msl_kernel_entry& kernel, Executor& e) {
  make_regions(d, kernel);
  make_blocks(d);
  for (uint32_t i = 0; i < d.buffer_count; i++)
    if (d.buffers[i].data)
      e.buffers[i] = reinterpret_cast<void*>(state.regions[i].begin);
  state.stacks_begin = e.stacks.begin();
  state.stacks_end = e.stacks.end();
  state.threadgroup = 0;
  state.last = nullptr;
  state.on = true;
}

void end(const msl_dispatch& d, bool) {
  state.on = false;
  for (uint32_t n = 0; n < d.buffer_count; n++) {
    const Region& r = state.regions[n];
    if (r.begin == reinterpret_cast<uint64_t>(d.buffers[n].data))
      continue; // it wasn't moved
    for (const msl_range& w : r.written.ranges())
      memcpy(static_cast<char*>(d.buffers[n].data) + w.begin,
             reinterpret_cast<char*>(r.begin) + w.begin, w.end - w.begin);
  }
  state.blocks.clear();
  state.variables.clear();
}

void begin_threadgroup() {
  state.threadgroup++;
  state.variables.clear();
  state.names.clear();
  memset(state.group_epoch, 0, sizeof state.group_epoch);
  memset(state.simd_epoch, 0, sizeof state.simd_epoch);
}

void add_threadgroup_variable(char* data, uint64_t size, const char* name) {
  const auto begin = reinterpret_cast<uint64_t>(data);
  state.variables.push_back(make_block(begin, begin + size, true));
  state.names.push_back(std::string("threadgroup '") + name + "'");
}

void threadgroup_barrier(int flags) {
  if (flags & kDevice)
    state.group_epoch[0]++;
  if (flags & kThreadgroup)
    state.group_epoch[1]++;
}

void simdgroup_barrier(uint32_t simdgroup, int flags) {
  if (flags & kDevice)
    state.simd_epoch[0][simdgroup]++;
  if (flags & kThreadgroup)
    state.simd_epoch[1][simdgroup]++;
}

void access(uint64_t address, uint64_t size, bool write, uint64_t pc) {
  check({address, size, write, false, pc, nullptr});
}

void atomic_access(const volatile void* p, uint64_t size, bool write, const msl_site& site) {
  check({reinterpret_cast<uint64_t>(p), size, write, true, 0, &site});
}

uint32_t touched(uint32_t n, bool written, msl_range* out, uint32_t capacity) {
  if (n >= state.regions.size())
    return 0;
  const std::vector<msl_range> all =
      (written ? state.regions[n].written : state.regions[n].read).ranges();
  std::copy_n(all.begin(), std::min<size_t>(all.size(), capacity), out);
  return static_cast<uint32_t>(all.size());
}

} // namespace msl::checker
