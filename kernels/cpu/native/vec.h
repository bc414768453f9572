// Vectors for the CPU kernels: one source, compiled once per instruction set (AVX2: 8 floats, AVX-512: 16).
//
// Same bits on every instruction set is the rule. So: elementwise code may use `vf` (W floats, W = 8 or 16) freely; a
// reduction across lanes uses `F16` (always 16 virtual lanes: two registers on AVX2, one on AVX-512) and its fixed
// tree `sum(F16)`. Every file is compiled with -ffp-contract=off: the only fused operation is an explicit fma().
//
// exp() and log() are ours because libm's may change with the machine. A tail of n < W elements goes through
// load(p, n) / store(p, v, n): masked lanes are 0 and never touch memory. With n >= W they are plain (on AVX2 behind a
// branch, since a masked store costs some processors 20 cycles and more).
//
// Each instruction set is a library of its own (see setup.py), so plain names cannot clash between them.
#pragma once

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX512F__
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
constexpr int LANES = 16;       // virtual lanes of F16
constexpr int PARTS = LANES / W;  // registers in an F16

typedef float vf __attribute__((vector_size(4 * W), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * W), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * W), may_alias));

struct bf16 {
  uint16_t bits;
};

// ---- scalars ----

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
// Round to nearest, ties to even; a NaN stays a (quiet) NaN. The same rule as torch's conversion.
INLINE uint16_t bf16_bits(float x) {
  uint32_t u = float_bits(x);
  if (x != x) return uint16_t((u >> 16) | 0x0040);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
template <class T> INLINE T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) { return bf16{bf16_bits(x)}; }
INLINE float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// ---- vectors: arithmetic + - * / and comparisons come with the type; `mask ? a : b` selects ----

INLINE vf splat(float x) { return x - vf{}; }
INLINE vi splat_int(int32_t x) { return x - vi{}; }
INLINE vf zero() { return vf{}; }

#ifdef __AVX512F__

INLINE __mmask16 below(int n) { return (__mmask16)(n >= W ? 0xffff : (1u << n) - 1); }
INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE vf load(const float* p) { return (vf)_mm512_loadu_ps(p); }
INLINE void store(float* p, vf v) { _mm512_storeu_ps(p, (__m512)v); }
INLINE vf load(const float* p, int n) { return (vf)_mm512_maskz_loadu_ps(below(n), p); }
INLINE void store(float* p, vf v, int n) { _mm512_mask_storeu_ps(p, below(n), (__m512)v); }
INLINE vf load(const bf16* p) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
INLINE vf load(const bf16* p, int n) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(below(n), p)), 16);
}
INLINE __m256i narrow(vf v) {  // lanes to bf16, as bf16_bits()
  __m512i u = (__m512i)v;
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i even = _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff));
  __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  even = _mm512_mask_or_epi32(even, nan, u, _mm512_set1_epi32(0x00400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(even, 16));
}
INLINE void store(bf16* p, vf v) { _mm256_storeu_si256((__m256i*)p, narrow(v)); }
INLINE void store(bf16* p, vf v, int n) { _mm256_mask_storeu_epi16(p, below(n), narrow(v)); }
INLINE vf sqrt(vf v) { return (vf)_mm512_sqrt_ps((__m512)v); }
INLINE vf round_even(vf v) { return (vf)_mm512_roundscale_ps((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// b where a is NaN or both are zero: max(lower_bound, x) keeps a NaN x.
INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE bool any(vi mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }
INLINE vf pick(const float* table, vi index) {  // of a table of 8, entry index % 8
  return (vf)_mm512_permutexvar_ps((__m512i)index, _mm512_broadcast_f32x8(_mm256_loadu_ps(table)));
}

#else

INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE vf load(const float* p) { return (vf)_mm256_loadu_ps(p); }
INLINE void store(float* p, vf v) { _mm256_storeu_ps(p, (__m256)v); }
INLINE __m256i lanes_below(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE vf load(const float* p, int n) { return n >= W ? load(p) : (vf)_mm256_maskload_ps(p, lanes_below(n)); }
INLINE void store(float* p, vf v, int n) {
  if (n >= W) return store(p, v);
  _mm256_maskstore_ps(p, lanes_below(n), (__m256)v);
}
INLINE vf load(const bf16* p) {
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
INLINE vf load(const bf16* p, int n) {
  if (n >= W) return load(p);
  bf16 tail[W] = {};
  memcpy(tail, p, size_t(n) * sizeof(bf16));
  return load(tail);
}
INLINE __m128i narrow(vf v) {  // lanes to bf16, as bf16_bits()
  __m256i u = (__m256i)v;
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i even = _mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff));
  __m256 nan = _mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x00400000));
  __m256i bits = _mm256_srli_epi32(_mm256_blendv_epi8(even, quiet, (__m256i)nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}
INLINE void store(bf16* p, vf v) { _mm_storeu_si128((__m128i*)p, narrow(v)); }
INLINE void store(bf16* p, vf v, int n) {
  if (n >= W) return store(p, v);
  bf16 tail[W];
  store(tail, v);
  memcpy(p, tail, size_t(n) * sizeof(bf16));
}
INLINE vf sqrt(vf v) { return (vf)_mm256_sqrt_ps((__m256)v); }
INLINE vf round_even(vf v) { return (vf)_mm256_round_ps((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// b where a is NaN or both are zero: max(lower_bound, x) keeps a NaN x.
INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE bool any(vi mask) { return !_mm256_testz_si256((__m256i)mask, (__m256i)mask); }
INLINE vf pick(const float* table, vi index) {  // of a table of 8, entry index % 8
  return (vf)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
}

#endif

INLINE vi to_int(vf v) { return __builtin_convertvector(v, vi); }  // truncates
INLINE vf to_vf(vi v) { return __builtin_convertvector(v, vf); }

// ---- 16 virtual lanes, for reductions ----

struct F16 {
  vf part[PARTS];
};
INLINE F16 splat16(float x) {
  F16 r;
  for (int i = 0; i < PARTS; i++) r.part[i] = splat(x);
  return r;
}
template <class T> INLINE F16 load16(const T* p) {
  F16 r;
  for (int i = 0; i < PARTS; i++) r.part[i] = load(p + i * W);
  return r;
}
template <class T> INLINE F16 load16(const T* p, int n) {  // n in [0, 16]; other lanes are 0
  F16 r;
  for (int i = 0; i < PARTS; i++) {
    int m = n - i * W;
    r.part[i] = m >= W ? load(p + i * W) : m > 0 ? load(p + i * W, m) : zero();
  }
  return r;
}
template <class T> INLINE void store16(T* p, F16 v) {
  for (int i = 0; i < PARTS; i++) store(p + i * W, v.part[i]);
}
template <class T> INLINE void store16(T* p, F16 v, int n) {
  for (int i = 0; i < PARTS; i++) {
    int m = n - i * W;
    if (m >= W) store(p + i * W, v.part[i]);
    else if (m > 0) store(p + i * W, v.part[i], m);
  }
}
INLINE F16 add(F16 a, F16 b) {
  for (int i = 0; i < PARTS; i++) a.part[i] = a.part[i] + b.part[i];
  return a;
}
INLINE F16 mul(F16 a, F16 b) {
  for (int i = 0; i < PARTS; i++) a.part[i] = a.part[i] * b.part[i];
  return a;
}
INLINE F16 fma(F16 a, F16 b, F16 c) {
  for (int i = 0; i < PARTS; i++) c.part[i] = fma(a.part[i], b.part[i], c.part[i]);
  return c;
}
INLINE F16 max(F16 a, F16 b) {
  for (int i = 0; i < PARTS; i++) a.part[i] = max(a.part[i], b.part[i]);
  return a;
}

// The fixed tree: lanes i and i + 8, then i and i + 4, i + 2, i + 1.
#ifdef __AVX512F__
INLINE __m256 fold(F16 v, __m256 (*op)(__m256, __m256)) {
  __m512 z = (__m512)v.part[0];
  return op(_mm512_castps512_ps256(z), _mm512_extractf32x8_ps(z, 1));
}
#else
INLINE __m256 fold(F16 v, __m256 (*op)(__m256, __m256)) { return op((__m256)v.part[0], (__m256)v.part[1]); }
#endif
INLINE float sum(F16 v) {
  __m256 h = fold(v, [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); });
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
INLINE float max(F16 v) {  // of numbers; says nothing about NaN
  __m256 h = fold(v, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); });
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}

// ---- exp and log ----

// e^x, within 1.1 ulp (2 in the denormal range): x = n ln2 + r, |r| <= ln2/2, a degree-7 polynomial for e^r, then
// scaled by 2^n in two exact-or-rounded-once steps so that denormal results round correctly. exp(0) = 1 exactly,
// exp(-inf) = 0, exp(inf) = inf, NaN stays.
INLINE vf exp(vf x) {
  x = max(splat(-104.f), min(splat(89.f), x));
  vf n = round_even(x * splat(1.44269504088896341f));
  vf r = fma(n, splat(-0.693145751953125f), x);
  r = fma(n, splat(-1.42860682030941723e-6f), r);
  vf p = splat(1.98412698e-4f);
  p = fma(p, r, splat(1.38888889e-3f));
  p = fma(p, r, splat(8.33333333e-3f));
  p = fma(p, r, splat(4.16666667e-2f));
  p = fma(p, r, splat(1.66666667e-1f));
  p = fma(p, r, splat(0.5f));
  p = fma(p * r, r, r) + splat(1.f);
  vi k = to_int(n);  // a NaN gives INT_MIN on x86: whatever the scale then is, p is NaN
  vi half = k >> 1;
  vf first = (vf)((vu)(half + 127) << 23), second = (vf)((vu)(k - half + 127) << 23);
  return p * first * second;
}

// ln x, within 1 ulp: x = 2^e m, m in [sqrt(1/2), sqrt(2)), Cephes' logf polynomial with fma. log(1) = 0 exactly,
// log(0) = -inf, log(x < 0) = NaN, log(inf) = inf, NaN stays; denormals are scaled up first.
INLINE vf log(vf x) {
  vi tiny = x < splat(1.17549435e-38f);
  vf scaled = tiny ? x * splat(8388608.f) : x;
  vu bits = (vu)scaled;                   // unsigned, since a negative x may wrap around
  vi e = (vi)(bits - 0x3f3504f3u) >> 23;  // sqrt(1/2) = 0x3f3504f3
  vf m = (vf)(bits - ((vu)e << 23));
  vf exponent = to_vf(e + (tiny & -23));
  vf r = m - splat(1.f);
  vf p = splat(7.0376836292e-2f);
  p = fma(p, r, splat(-1.1514610310e-1f));
  p = fma(p, r, splat(1.1676998740e-1f));
  p = fma(p, r, splat(-1.2420140846e-1f));
  p = fma(p, r, splat(1.4249322787e-1f));
  p = fma(p, r, splat(-1.6668057665e-1f));
  p = fma(p, r, splat(2.0000714765e-1f));
  p = fma(p, r, splat(-2.4999993993e-1f));
  p = fma(p, r, splat(3.3333331174e-1f));
  vf z = r * r;
  vf y = fma(exponent, splat(-2.12194440e-4f), p * r * z);
  y = fma(splat(-0.5f), z, y);
  y = fma(exponent, splat(0.693359375f), y + r);
  const float inf = __builtin_inff();
  y = x == splat(inf) ? x : y;
  y = x == splat(0.f) ? splat(-inf) : y;
  return x >= splat(0.f) ? y : splat(__builtin_nanf(""));
}

// The vector's bits, one element at a time.
INLINE float exp1(float x) { return exp(splat(x))[0]; }
INLINE float log1(float x) { return log(splat(x))[0]; }

// ---- threads ----

// Splits [0, n) into contiguous ranges, one per OpenMP thread (torch's pool, torch.set_num_threads governs it), when
// the work is worth waking them. work_ns: a guess of the whole work on one thread.
template <class Body> INLINE void parallel(int64_t n, double work_ns, Body body) {
  int threads = work_ns > 50e3 ? omp_get_max_threads() : 1;
  if (threads > n) threads = int(n);
  if (threads <= 1) {
    body(int64_t(0), n);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    int64_t i = omp_get_thread_num(), count = omp_get_num_threads();
    body(n * i / count, n * (i + 1) / count);
  }
}
