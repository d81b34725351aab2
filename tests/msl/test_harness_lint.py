"""What C++ accepts and Metal doesn't is rejected with file and line: by the lint, by the types."""

import pytest

from .build import MetalCompileError
from .library import compile
from .lint import lint

KERNEL = """
kernel void k(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {{ {} }}
"""


def body(text: str) -> str:
    return KERNEL.format(text)


OUTSIDE = "a variable outside of functions has to be in 'constant'"


def pointer(kind: str) -> str:
    return f"a pointer or reference to '{kind}' without address space"


REJECTED = [
    (body("double x = 1;"), "Metal has no 'double'"),
    (body("y[i] = std::max(y[i], 1.0f);"), "Metal has no 'std': its library is in namespace metal"),
    (body("auto f = [](float x) { return x; }; y[i] = f(1);"), "Metal has no lambdas"),
    (body("auto f = [&] { return 1.0f; }; y[i] = f();"), "Metal has no lambdas"),
    (body("thread float* p = new float[2];"), "Metal has no 'new': memory can't be allocated"),
    (body("again: if (i) goto again;"), "Metal has no 'goto'"),
    (body("static float kept = 0; y[i] = kept++;"), "a static variable has to be in 'constant'"),
    (body("try { y[i] = 1; } catch (int) {}"), "Metal has no 'try': there are no exceptions"),
    (body("long long big = 1;"), "Metal has no 'long long'"),
    (body('constant char* s = "text";'), "Metal has no strings"),
    (body("float* p = nullptr;"), pointer("float")),
    (body("float4 v = 1; float4& r = v;"), pointer("float4")),
    (body("float x = 0; const float *p = (thread float*)&x;"), pointer("float")),
    (body("threadgroup float t[4] = {0};"), "a threadgroup variable can't have an initial value"),
    (body("simdgroup_float8x8 m; m.thread_elements();"), "Metal has no 'thread_elements' that"),
    ("\nfloat scale = 2;" + body(""), OUTSIDE),
    ("\nconstexpr uint kWidth = 2;" + body(""), OUTSIDE),
    ("\nnamespace n { static int count; }" + body(""), OUTSIDE),
    ("\nfloat table[2] = {1, 2};" + body(""), OUTSIDE),
    ("\nstruct S { float x; float* next; };" + body(""), pointer("float")),
    ("\nfloat f(float* p) { return *p; }" + body(""), pointer("float")),
    ("\nstruct S { int a; };\nint f(S& s) { return s.a; }" + body(""), pointer("S")),
    ("\nusing F = float;\nF f(const F& x) { return x; }" + body(""), pointer("F")),
    (
        "\ntemplate <typename T> T f(T* p) { return *p; }" + body(""),
        pointer("T"),
    ),
    (
        "\nkernel void k(device float* const* p [[buffer(0)]]) {}\n",
        "a pointer to a pointer to 'float' without address space",
    ),
    (
        "\nint f(int n) { return n ? f(n - 1) : 0; }" + body("y[i] = f(3);"),
        "'f' calls itself: Metal has no recursion",
    ),
    (
        "\nint g(int n);\nint f(int n) { return g(n); }\nint g(int n) { return f(n); }" + body(""),
        "'f' calls itself: Metal has no recursion",
    ),
    (
        "\nvoid f(uint i) { threadgroup float shared[8]; shared[i] = 0; }" + body("f(i);"),
        "a threadgroup variable in 'f', which is no kernel",
    ),
]


@pytest.mark.parametrize(("text", "message"), REJECTED, ids=[m for _, m in REJECTED])
def test_rejected(text: str, message: str) -> None:
    problems = lint('# 1 "x.metal"' + text)
    assert any(message in p for p in problems), problems
    lines = text.split("\n")
    assert all(p.startswith("x.metal:") and int(p.split(":")[1]) < len(lines) for p in problems)


ACCEPTED = """
#include <metal_stdlib>
using namespace metal;
constant constexpr uint kWidth = 8;
constant float kTable[2] = {1.0f, 2.0f};
struct Args { uint n; device const float* x; };
template <typename T, int n> struct Tile { static constexpr constant int kSize = n; T values[n]; };
template <typename T> struct Kind { using type = float; };
enum Mode { kPlain, kScaled };
static_assert(sizeof(Args) == 16, "a message");
namespace inner { inline float half_of(float x) { return x / 2; } }
template <int n> int power() { return n ? 2 * power<n - 1>() : 1; }
template <> int power<0>() { return 1; }
float area(const thread float4& v, float4 other) { return v.x * other.x; }
device float* next(device float* p, int n) { return p + n; }
template <typename T>
device typename Kind<T>::type* as(device typename Kind<T>::type* p) { return p; }
kernel void k(device float* y [[buffer(0)]], constant Args& args [[buffer(1)]],
              threadgroup float* room [[threadgroup(0)]], uint i [[thread_position_in_grid]]) {
  threadgroup float shared[kWidth];
  threadgroup float* place = &shared[i];
  const float a = float(i) * 2, b = (a) * (a);
  constant const float* table = kTable;
  int4 codes[2] = {int4(1), int4(2)};
  const int picked = codes[power<0>() & 1][kWidth & 3];
  place[0] = a * b * table[0] * picked + NAN;
  *next(y, 0) = args.x[i] * inner::half_of(area(float4(1), float4(a))) + place[0] + room[0];
}
"""


def test_what_metal_has_is_accepted() -> None:
    assert compile(ACCEPTED).kernels == ["k"]


PARAMETERS = """
device const half* x [[buffer(0)]], device float* y [[buffer(1)]], constant uint& n [[buffer(2)]],
uint i [[thread_position_in_grid]]"""
TYPE_ERRORS = [
    ("device half* p = x;", "cannot initialize a variable of type 'device half *'"),
    ("threadgroup half t[4]; device half* p = t;", "cannot initialize a variable of type"),
    ("thread const half* p = x;", "cannot initialize a variable of type 'const half *'"),
    ("thread float* p = y;", "cannot initialize a variable of type 'float *'"),
    ("constant uint* p = &n; device const uint* q = p;", "cannot initialize a variable of type"),
    ("float z = y[0]; y[i] = *(device float*)&z;", "a cast from one address space to another"),
    ("device const uint* q = (device const uint*)&n; y[i] = q[0];", "a cast from one address"),
    ("n = 3;", "cannot assign to variable 'n' with const-qualified type"),
    ("x[0] = 0.0h;", "read-only variable is not assignable"),
    ("half4 v = float4(1);", "cannot initialize a variable of type 'half4'"),
    ("float4 v = float4(1, 2, 3);", "Metal: wrong number of components for the vector"),
    ("float3 v = float3(float4(1));", "Metal: vectors of different lengths don't convert"),
    ("bfloat b = y[0];", "implicit conversion loses floating-point precision: 'float"),
    ("y[i] = max(n, 1);", "no matching function for call to 'max'"),
    ("int4 v = int4(1) + uint4(1);", "cannot convert between vector"),
    ("y[i] = simd_sum(ulong(i));", "a simdgroup does not exchange bool, long or ulong"),
    ("y[i] = simd_shuffle(i > 1, 0);", "a simdgroup does not exchange bool, long or ulong"),
    ("y[i] = as_type<float>(1.0h);", "as_type between types of different sizes"),
    ("simdgroup_float8x8 m; simdgroup_load(m, x, 8);", "simdgroup_load: the element types differ"),
    ("float a[4]; y[i] = a[4];", "array index 4 is past the end of the array"),
    ("float a; y[i] = a;", "variable 'a' is uninitialized when used here"),
    ("static_assert(sizeof(1.0) == 8);", "static assertion failed"),
    ("if constexpr (true) y[i] = 0;", "constexpr if is a C++17 extension; Metal is C++14"),
    ("y[i] = y[0] * y[1] + x[0];", "a product and a sum in one statement; write fma(...)"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), TYPE_ERRORS, ids=[t for t, _ in TYPE_ERRORS])
def test_type_error_names_the_line(text: str, message: str) -> None:
    head = "#include <metal_stdlib>\nusing namespace metal;\n"
    source = f"{head}kernel void k({PARAMETERS}) {{\n{text}\n}}\n"
    mode = "check" if "cast" in message or "product" in message else "typed"  # found in the code
    with pytest.raises(MetalCompileError) as error:
        compile(source, mode)
    assert message in str(error.value)
    assert "text.metal:6: " in str(error.value)


def test_a_half_may_be_made_from_a_float() -> None:
    compile(body("half h = y[i]; y[i] = h;"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("void f() {}\n", "the text has no kernel that a host can ask for"),
        ("kernel void k(uint i) {}\n", "kernel parameter 'uint i' has no attribute"),
        ("kernel void k(device int* a [[buffer(1)]], device int* b [[buffer(1)]]) {}\n",
         "buffer(1) is bound twice"),
        ("kernel void k(device int* a [[buffer(31)]]) {}\n", "buffer(31): Metal has 0 to 30"),
        ("kernel void k(int i [[thread_position_in_grid]]) {}\n",
         "text.metal:1: 'int i': thread_position_in_grid is a ushort or uint or 2 or 3 of them"),
        ("kernel void k(uint2 i [[thread_index_in_simdgroup]]) {}\n",
         "'uint2 i': thread_index_in_simdgroup is a ushort or uint"),
        ("kernel void k(uint3 i [[thread_position_in_grid]], uint n [[threads_per_threadgroup]], "
         "uint2 g [[threadgroups_per_grid]]) {}\n", "are vectors of different lengths"),
        ("kernel void k(uint3 i [[thread_position_in_grid]], uint n [[threads_per_grid]]) {}\n",
         "'uint3 i' and 'uint n' have to be of one type"),
        ("kernel void k(device int* a) { a[0] = (1; }\n", "text.metal:1: no bracket closes"),
        ('template [[host_name("a")]] [[kernel]] decltype(f<1>) f<1>;\n', "which is no kernel"),
        ("#include <iostream>\nkernel void k(device int* a) {}\n", "'iostream' file not found"),
        ("kernel int k(device int* a) { return 1; }\n", "kernel 'k' has to return void"),
    ],
)  # fmt: skip
def test_text_that_is_not_understood(text: str, message: str) -> None:
    with pytest.raises(MetalCompileError) as error:
        compile("\n" * ("\n" not in text) + text)
    assert message in str(error.value).split("\n")[0]
