#include "sink.h"

#import <Metal/Metal.h>

#include <ATen/mps/MPSStream.h>

#include <mutex>
#include <utility>

namespace q4metal::mps {
namespace {

struct Failure {
  std::mutex mutex;
  std::optional<std::string> text;

  static Failure& instance() {
    static auto* failure = new Failure; // completion handlers may outlive static destructors
    return *failure;
  }
};

class MetalSink final : public CommandSink {
public:
  // The encoder lives as long as the autorelease pool that it was made in.
  explicit MetalSink(id<MTLComputeCommandEncoder> encoder) : encoder_(encoder) {}
  ~MetalSink() override { [encoder_ endEncoding]; }

  void pipeline(const void* state) override {
    [encoder_ setComputePipelineState:(id<MTLComputePipelineState>)state];
  }

  void buffer(unsigned index, Memory memory) override {
    [encoder_ setBuffer:(id<MTLBuffer>)memory.buffer offset:memory.offset atIndex:index];
  }

  void bytes(unsigned index, const void* data, size_t size) override {
    [encoder_ setBytes:data length:size atIndex:index];
  }

  void resident(Memory memory, bool written) override {
    const NSUInteger usage = MTLResourceUsageRead | (written ? MTLResourceUsageWrite : 0);
    [encoder_ useResource:(id<MTLBuffer>)memory.buffer usage:MTLResourceUsage(usage)];
  }

  void dispatch(const Launch& launch) override {
    const auto& groups = launch.groups;
    const auto& threads = launch.threads;
    [encoder_ dispatchThreadgroups:MTLSizeMake(groups[0], groups[1], groups[2])
             threadsPerThreadgroup:MTLSizeMake(threads[0], threads[1], threads[2])];
  }

  void barrier() override { [encoder_ memoryBarrierWithScope:MTLBarrierScopeBuffers]; }

private:
  id<MTLComputeCommandEncoder> encoder_;
};

void note_failure(id<MTLCommandBuffer> buffer) {
  if (buffer.status != MTLCommandBufferStatusError)
    return;
  const char* text = buffer.error.localizedDescription.UTF8String;
  auto& failure = Failure::instance();
  const std::lock_guard lock(failure.mutex);
  failure.text = text == nullptr ? "no reason given" : text;
}

} // namespace

void submit(const std::function<void(CommandSink&)>& encode) {
  auto* stream = at::mps::getCurrentMPSStream();
  at::mps::dispatch_sync_with_rethrow(stream->queue(), ^{
    @autoreleasepool {
      // torch's own operators share a serial encoder; it ends here, ours is concurrent.
      stream->endKernelCoalescing();
      id<MTLCommandBuffer> commands = stream->commandBuffer();
      {
        MetalSink sink([commands computeCommandEncoderWithDispatchType:MTLDispatchTypeConcurrent]);
        encode(sink);
      }
      // Not the stream's addCompletedHandler: it waits for the queue that this block runs on.
      [commands addCompletedHandler:^(id<MTLCommandBuffer> buffer) {
        note_failure(buffer);
      }];
      stream->synchronize(at::mps::SyncType::COMMIT);
    }
  });
}

std::optional<std::string> take_failure() {
  auto& failure = Failure::instance();
  const std::lock_guard lock(failure.mutex);
  return std::exchange(failure.text, std::nullopt);
}

} // namespace q4metal::mps
