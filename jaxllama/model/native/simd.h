// Vectors of the instruction set that this is compiled for: AVX-512F (CPUs with AMX have it), AVX2 with FMA, or NEON; the
// rest of the kernels is the same for all. The compiler's own vector types (GCC, Clang) give arithmetic; what they lack is
// here.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#define JAXLLAMA_LANES 16
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define JAXLLAMA_LANES 8
#elif defined(__aarch64__)
#include <arm_neon.h>
#define JAXLLAMA_LANES 4
#else
#error "the kernels need AVX2 and FMA, AVX-512F, or NEON"
#endif

// Whether pairs of bfloat16 are multiplied and added to float32 by one instruction (VDPBF16PS).
#if defined(__AVX512BF16__)
#define JAXLLAMA_DOTS_PAIRS 1
#else
#define JAXLLAMA_DOTS_PAIRS 0
#endif

// Whether a unit multiplies tiles of them (amx.h).
#if defined(__AMX_BF16__)
#define JAXLLAMA_AMX 1
#else
#define JAXLLAMA_AMX 0
#endif

namespace jaxllama {

constexpr int64_t kLineBytes = 64;  // of packed matrices, and of the CPU's caches

// An array that begins with a line of the caches.
template <typename T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <typename U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{kLineBytes})); }
  void deallocate(T* at, size_t) { ::operator delete(at, std::align_val_t{kLineBytes}); }
  template <typename U>
  bool operator==(const LineAllocator<U>&) const { return true; }
  template <typename U>
  bool operator!=(const LineAllocator<U>&) const { return false; }
};
template <typename T>
using Aligned = std::vector<T, LineAllocator<T>>;

using BFloat16 = uint16_t;

constexpr int kLanes = JAXLLAMA_LANES;
constexpr int kBlockLanes = 16;  // outputs, or keys, that lie together
constexpr int kVectors = kBlockLanes / kLanes;

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));

template <typename V>
inline V Load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename V>
inline void Store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

// Byte kByte of each lane in the place of its highest, and zeros below.
template <int kByte>
inline I32 TopByte(I32 v) {
#if defined(__AVX2__)
  if constexpr (kByte == 1 || kByte == 2) {
    constexpr int8_t kZero = -1;
    const __m128i from = _mm_setr_epi8(kZero, kZero, kZero, kByte, kZero, kZero, kZero, kByte + 4, kZero, kZero, kZero,
                                       kByte + 8, kZero, kZero, kZero, kByte + 12);
#if defined(__AVX512F__)
    return (I32)_mm512_shuffle_epi8((__m512i)v, _mm512_broadcast_i32x4(from));
#else
    return (I32)_mm256_shuffle_epi8((__m256i)v, _mm256_broadcastsi128_si256(from));
#endif
  }
#endif
  return (I32)(((U32)v << (24 - 8 * kByte)) & 0xff000000u);
}

#if !defined(__AVX2__) || defined(__AVX512F__)
inline void Wait(F32&, const float*&, const char*&) {}
#endif

// In assembly: GCC takes a function that does nothing but `__builtin_prefetch` for one without effects, and drops calls.
#if defined(__x86_64__)
inline void Prefetch(const void* p) { __asm__ volatile("prefetcht0 %0" ::"m"(*static_cast<const char*>(p))); }
inline void PrefetchToSecondLevel(const void* p) {
  __asm__ volatile("prefetcht1 %0" ::"m"(*static_cast<const char*>(p)));
}
#else
inline void Prefetch(const void* p) { __asm__ volatile("prfm pldl1keep, [%0]" ::"r"(p)); }
inline void PrefetchToSecondLevel(const void* p) { __asm__ volatile("prfm pldl2keep, [%0]" ::"r"(p)); }
#endif

inline F32 Floats(I32 v) { return __builtin_convertvector(v, F32); }

// Of NaN and a number, b.
inline F32 Max(F32 a, F32 b) { return a > b ? a : b; }

#if defined(__AVX512F__)

constexpr const char* kInstructionSet = JAXLLAMA_AMX ? "AMX" : JAXLLAMA_DOTS_PAIRS ? "AVX-512 BF16" : "AVX-512F";

inline F32 Set1(float x) { return _mm512_set1_ps(x); }
inline F32 Fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline void Pause() { _mm_pause(); }

#if JAXLLAMA_DOTS_PAIRS
// c + a₀b₀ + a₁b₁ in every lane; `pair` is a.
inline F32 DotPairs(int32_t pair, I32 b, F32 c) {
  return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
}
#endif

// Rows of 16 to columns of 16. Called, it would take them from memory, and give them back there.
__attribute__((always_inline)) inline void Transpose(I32 rows[kLanes]) {
  __m512i v[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = (__m512i)rows[i];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    rows[i] = (I32)_mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = (I32)_mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

#elif defined(__AVX2__)

constexpr const char* kInstructionSet = "AVX2";

// Has the compiler read from `x` and `line` only once it has `sum`: of 16 registers it would otherwise use too many for
// what it reads early, and keep sums on the stack, which took 1.7 times as long.
inline void Wait(F32& sum, const float*& x, const char*& line) {
  __asm__("" : "+x"(sum), "+r"(x), "+r"(line));
}
inline F32 Set1(float x) { return _mm256_set1_ps(x); }
inline F32 Fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline void Pause() { _mm_pause(); }

// Rows of 8 to columns of 8.
__attribute__((always_inline)) inline void Transpose(I32 rows[kLanes]) {
  __m256i v[8], t[8];
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) v[i] = (__m256i)rows[i];
#pragma GCC unroll 16
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    rows[i] = (I32)_mm256_permute2x128_si256(v[i], v[i + 4], 0x20);
    rows[i + 4] = (I32)_mm256_permute2x128_si256(v[i], v[i + 4], 0x31);
  }
}

#else

constexpr const char* kInstructionSet = "NEON";

inline F32 Set1(float x) { return (F32)vdupq_n_f32(x); }
inline F32 Fma(F32 a, F32 b, F32 c) { return (F32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
inline void Pause() { __asm__ volatile("yield"); }

// Rows of 4 to columns of 4.
__attribute__((always_inline)) inline void Transpose(I32 rows[kLanes]) {
  const int32x4x2_t a = vtrnq_s32((int32x4_t)rows[0], (int32x4_t)rows[1]);
  const int32x4x2_t b = vtrnq_s32((int32x4_t)rows[2], (int32x4_t)rows[3]);
#pragma GCC unroll 16
  for (int i = 0; i < 2; ++i) {
    rows[i] = (I32)vcombine_s32(vget_low_s32(a.val[i]), vget_low_s32(b.val[i]));
    rows[i + 2] = (I32)vcombine_s32(vget_high_s32(a.val[i]), vget_high_s32(b.val[i]));
  }
}

#endif

// The lanes' sum, or largest, by halves.
template <typename Combine>
inline float Fold(F32 v, Combine combine) {
  float lanes[kLanes];
  Store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

inline float ToFloat(float x) { return x; }

inline float ToFloat(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// The nearest bfloat16, of two the even one, in the upper half of each lane, which is a float32; NaN stays NaN.
template <typename Bits>
inline Bits RoundToBFloat16(Bits x) {
  const Bits rounded = (x + 0x7fffu + ((x >> 16) & 1u)) & 0xffff0000u;
  return (x & 0x7fffffffu) > 0x7f800000u ? (x | 0x400000u) & 0xffff0000u : rounded;
}

// 2^x for x ≤ 0, to 2e-7 of it: 1 at 0, and 0 from -127 on. NaN stays NaN. The polynomial is the least-maximum fit of
// its degree to 2^f for |f| ≤ 1/2 among those that are 1 at 0.
inline F32 Exp2(F32 x) {
  x = Max(Set1(-127.0f), x);
  const F32 shift = Set1(12582912.0f);  // 1.5 × 2^23: the sum's low bits are the nearest integer
  const F32 shifted = x + shift;
  const F32 f = x - (shifted - shift);
  F32 p = Set1(0.001326472731307149f);
  for (float c : {0.009671512991189957f, 0.05550733581185341f, 0.24022242426872253f, 0.6931470036506653f, 1.0f}) {
    p = Fma(p, f, Set1(c));
  }
  return (F32)((U32)p + ((U32)shifted << 23));
}

}  // namespace jaxllama
