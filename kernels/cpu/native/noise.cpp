// Standard normal noise by counter, in fp64 without a fused operation, rounded to fp32 once.
//
// kernels/reference/noise.py and kernels.exact.ln_of define every operation and its order. This code does the same ones,
// one number a lane, so it gives their bits on every instruction set, and no number depends on its neighbours.
//
// Numbers are made in blocks: first the ratio for the centre, for all of them; then the places of the 15 % that lie in a
// tail are gathered, so that logarithm and root are taken of those alone.
#include "vec.h"

namespace {

typedef double vd __attribute__((vector_size(4 * W), may_alias));
typedef uint64_t vq __attribute__((vector_size(4 * W), may_alias));
typedef int64_t vs __attribute__((vector_size(4 * W), may_alias));
constexpr int HALF = W / 2;  // lanes of a vd
typedef float vh __attribute__((vector_size(2 * W), may_alias));

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15ull;
constexpr int64_t BLOCK = 512;  // numbers; a multiple of HALF
constexpr uint64_t SIGN = 1ull << 63, MANTISSA = (1ull << 52) - 1;

INLINE vd splatd(double x) { return x - vd{}; }
INLINE vq splatq(uint64_t x) { return x - vq{}; }
#ifdef __AVX512F__
INLINE vd root_of(vd x) { return (vd)_mm512_sqrt_pd((__m512d)x); }
#else
INLINE vd root_of(vd x) { return (vd)_mm256_sqrt_pd((__m256d)x); }
#endif

// Wichura's coefficients, of ascending powers.
constexpr double CENTRE[2][8] = {
    {3.3871328727963666080, 133.14166789178437745, 1971.5909503065514427, 13731.693765509461125,
     45921.953931549871457, 67265.770927008700853, 33430.575583588128105, 2509.0809287301226727},
    {1.0, 42.313330701600911252, 687.18700749205790830, 5394.1960214247511077,
     21213.794301586595867, 39307.895800092710610, 28729.085735721942674, 5226.4952788528545610}};
constexpr double TAIL[2][8] = {
    {1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550, 3.64784832476320460504,
     1.27045825245236838258, 0.241780725177450611770, 0.0227238449892691845833, 7.74545014278341407640e-4},
    {1.0, 2.05319162663775882187, 1.67638483018380384940, 0.689767334985100004550,
     0.148103976427480074590, 0.0151986665636164571966, 5.47593808499534494600e-4, 1.05075007164441684324e-9}};
constexpr double FAR[2][8] = {
    {6.65790464350110377720, 5.46378491116411436990, 1.78482653991729133580, 0.296560571828504891230,
     0.0265321895265761230930, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7},
    {1.0, 0.599832206555887937690, 0.136929880922735805310, 0.0148753612908506148525,
     7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15}};

INLINE vd polynomial(const double* c, vd x) {
  vd total = splatd(c[7]);
  for (int i = 6; i >= 0; i--) total = total * x + splatd(c[i]);
  return total;
}

INLINE vq splitmix64(vq x) {
  x += splatq(GOLDEN);
  x = (x ^ (x >> 30)) * splatq(0xBF58476D1CE4E5B9ull);
  x = (x ^ (x >> 27)) * splatq(0x94D049BB133111EBull);
  return x ^ (x >> 31);
}

// (m + 1/2) / 2^53, m the upper 53 bits as a two's complement number. Its size is (n + 1/2) / 2^53, n the lower 52 of
// them, inverted where the sign is negative: as the mantissa of 1/2 + n / 2^53 they need no conversion. All exact.
INLINE vd offset_of(vq word) {
  const vq negative = (vq)((vs)word < vs{});
  const vq n = ((word >> 11) ^ negative) & splatq(MANTISSA);
  const vd size = (vd)(n | splatq(0x3FEull << 52)) - splatd(0.5 - 0x1p-54);
  return (vd)((vq)size | (word & splatq(SIGN)));
}

INLINE vd size_of(vd x) { return (vd)((vq)x & splatq(~SIGN)); }

// kernels.exact.ln_of
INLINE vd ln_of(vd x) {
  const vq bits = (vq)x;
  vd m = (vd)((bits & splatq(MANTISSA)) | splatq(0x3FEull << 52));            // in [1/2, 1)
  vd e = (vd)((bits >> 52) | splatq(0x433ull << 52)) - splatd(0x1p52 + 1022);  // as an integer's double, exact
  const vs small = m < splatd(0.7071067811865476);
  m = small ? m + m : m;
  e = small ? e - splatd(1.0) : e;
  const vd z = (m - splatd(1.0)) / (m + splatd(1.0)), square = z * z;
  vd series = splatd(0.0);
  for (int k = 23; k > 1; k -= 2) series = (series + splatd(1.0 / k)) * square;
  const vd low = e * splatd(1.90821492927058770002e-10) + splatd(2.0) * (z + z * series);
  return e * splatd(0.693147180369123816490) + low;
}

INLINE vd centre(vd q) {
  const vd square = splatd(0.180625) - q * q;
  return q * polynomial(CENTRE[0], square) / polynomial(CENTRE[1], square);
}

INLINE vd tail(vd q) {
  const vd r = root_of(-ln_of(splatd(0.5) - size_of(q))), near = r - splatd(1.6);
  vd size = polynomial(TAIL[0], near) / polynomial(TAIL[1], near);
  const vs far = r > splatd(5.0);
  if (any((vi)far)) {
    const vd rest = r - splatd(5.0);
    size = far ? polynomial(FAR[0], rest) / polynomial(FAR[1], rest) : size;
  }
  return (vd)((vq)size | ((vq)q & splatq(SIGN)));
}

// The numbers of `count` <= BLOCK words, into z, which has room for BLOCK. word(i) gives those of HALF neighbours from i
// on, also past `count`.
template <class Words> INLINE void block(Words word, int64_t count, double* z) {
  alignas(64) double q[BLOCK];
  int32_t at[BLOCK];
  for (int64_t i = 0; i < count; i += HALF) {
    const vd x = offset_of(word(i)), y = centre(x);
    memcpy(q + i, &x, sizeof x);
    memcpy(z + i, &y, sizeof y);
  }
  int tails = 0;
  for (int64_t i = 0; i < count; i++) {  // without a branch, which could not be foreseen
    at[tails] = int32_t(i);
    tails += (q[i] > 0.425) | (q[i] < -0.425);
  }
  for (int t = 0; t < tails; t += HALF) {
    const int here = tails - t < HALF ? tails - t : HALF;
    vd x;
    for (int lane = 0; lane < HALF; lane++) x[lane] = q[at[t + (lane < here ? lane : 0)]];
    const vd y = tail(x);
    for (int lane = 0; lane < here; lane++) z[at[t + lane]] = y[lane];
  }
}

}  // namespace

// key [rows]; out [rows, count].
EXPORT int64_t normal_rows(const int64_t* key, int64_t rows, int64_t count, float* out) {
  const int64_t blocks = (count + BLOCK - 1) / BLOCK;  // of a row
  parallel(rows * blocks, double(rows) * double(count) * 5.0, [=](int64_t begin, int64_t end) {
    vq lanes;
    for (int lane = 0; lane < HALF; lane++) lanes[lane] = uint64_t(lane + 1) * GOLDEN;
    for (int64_t b = begin; b < end; b++) {
      const int64_t row = b / blocks, first = b % blocks * BLOCK;
      const int64_t here = count - first < BLOCK ? count - first : BLOCK;
      int64_t mine;
      memcpy(&mine, key + row, sizeof mine);
      const vq start = splatq(uint64_t(mine) + uint64_t(first) * GOLDEN) + lanes;
      alignas(64) double z[BLOCK];
      alignas(64) float rounded[BLOCK];
      block([=](int64_t i) { return splitmix64(start + splatq(uint64_t(i) * GOLDEN)); }, here, z);
      for (int64_t i = 0; i < here; i += HALF) {
        vd x;
        memcpy(&x, z + i, sizeof x);
        const vh y = __builtin_convertvector(x, vh);
        memcpy(rounded + i, &y, sizeof y);
      }
      memcpy(out + row * count + first, rounded, size_t(here) * sizeof *out);
    }
  });
  return 0;
}

// The numbers of n given words before they are rounded, for tests and the self-check.
EXPORT int64_t vec_normal(const int64_t* word, double* out, int64_t n) {
  for (int64_t first = 0; first < n; first += BLOCK) {
    const int64_t here = n - first < BLOCK ? n - first : BLOCK;
    alignas(64) uint64_t mine[BLOCK] = {};
    alignas(64) double z[BLOCK];
    memcpy(mine, word + first, size_t(here) * sizeof *word);
    block(
        [&](int64_t i) {
          vq x;
          memcpy(&x, mine + i, sizeof x);
          return x;
        },
        here, z);
    memcpy(out + first, z, size_t(here) * sizeof *out);
  }
  return 0;
}
