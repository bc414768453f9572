// Standard normal noise from counters, in fp64 without a fused operation.
//
// kernels/reference/noise.py and kernels/exact.py (ln_of) define every operation and its order. This code does the same
// ones, a number a lane, so it gives their bits on every instruction set, and no number depends on its neighbours.
#include "gemm.h"

namespace {

typedef double vd __attribute__((vector_size(4 * W), may_alias));
typedef int64_t vl __attribute__((vector_size(4 * W), may_alias));
constexpr int LANES_D = W / 2;  // of a vd
constexpr int BLOCK = 512;      // numbers whose tails are gathered and computed together

INLINE vd splatd(double x) { return x - vd{}; }
#ifdef __AVX512F__
INLINE vd root_of(vd x) { return (vd)_mm512_sqrt_pd((__m512d)x); }
#else
INLINE vd root_of(vd x) { return (vd)_mm256_sqrt_pd((__m256d)x); }
#endif

constexpr double CENTRE[2][8] = {
    {2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457, 13731.693765509461125,
     1971.5909503065514427, 133.14166789178437745, 3.387132872796366608},
    {5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867, 5394.1960214247511077,
     687.1870074920579083, 42.313330701600911252, 1.0}};
constexpr double TAIL[2][8] = {
    {7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
     3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734},
    {1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
     0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0}};
constexpr double FAR[2][8] = {
    {2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093,
     0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772},
    {2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
     0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0}};

INLINE vd ratio(vd x, const double (*c)[8]) {
  vd upper = splatd(c[0][0]), lower = splatd(c[1][0]);
  for (int i = 1; i < 8; i++) upper = upper * x + splatd(c[0][i]), lower = lower * x + splatd(c[1][i]);
  return upper / lower;
}

// ln of positive normal numbers.
INLINE vd ln_of(vd x) {
  const vl bits = (vl)x;
  vd m = (vd)((bits & 0x000FFFFFFFFFFFFFll) | 0x3FE0000000000000ll), e;  // in [1/2, 1)
  for (int n = 0; n < LANES_D; n++) e[n] = double((bits[n] >> 52) - 1022);
  const vl small = m < splatd(0.7071067811865476);
  m = small ? m + m : m;
  e = small ? e - splatd(1.0) : e;
  const vd z = (m - splatd(1.0)) / (m + splatd(1.0)), square = z * z;
  vd series = splatd(0.0);
  for (int k = 23; k > 1; k -= 2) series = (series + splatd(1.0 / k)) * square;
  return e * splatd(0.693147180369123816490) +
         (e * splatd(1.90821492927058770002e-10) + splatd(2.0) * (z + z * series));
}

INLINE vd tail(vd p) {
  const vd r = root_of(-ln_of(p));
  const vl far = r > splatd(5.0);
  vd z = ratio(r - splatd(1.6), TAIL);
  bool any = false;
  for (int n = 0; n < LANES_D; n++) any |= far[n] != 0;
  if (any) z = far ? ratio(r - splatd(5.0), FAR) : z;
  return -z;
}

INLINE uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Numbers first ... first + n - 1 of a key's row, n at most BLOCK.
INLINE void block(uint64_t key, int64_t first, int n, float* out) {
  alignas(64) double p[BLOCK + LANES_D], rare[BLOCK + LANES_D];
  alignas(64) double z[BLOCK + LANES_D];
  uint64_t sign[BLOCK];
  int where[BLOCK], found = 0;
  for (int i = 0; i < n; i++) {
    const uint64_t word = splitmix64(key + uint64_t(first + i + 1) * 0x9E3779B97F4A7C15ull);
    p[i] = (double(int64_t(word >> 11 & 0xFFFFFFFFFFFFFull)) + 0.5) * 0x1p-53;
    sign[i] = word >> 63;
  }
  for (int i = n; i < n + LANES_D; i++) p[i] = 0.5;
  for (int i = 0; i < n; i += LANES_D) {
    const vd q = *(const vd*)(p + i) - splatd(0.5);
    *(vd*)(z + i) = q * ratio(splatd(0.180625) - q * q, CENTRE);
  }
  for (int i = 0; i < n; i++) {
    where[found] = i, rare[found] = p[i];
    found += p[i] - 0.5 < -0.425;
  }
  for (int i = found; i < found + LANES_D; i++) rare[i] = 0.01;
  for (int i = 0; i < found; i += LANES_D) *(vd*)(rare + i) = tail(*(const vd*)(rare + i));
  for (int i = 0; i < found; i++) z[where[i]] = rare[i];
  for (int i = 0; i < n; i++) out[i] = sign[i] ? -float(z[i]) : float(z[i]);
}

}  // namespace

// key [rows] -> out [rows, count]
EXPORT int64_t normal_noise(const int64_t* key, int64_t rows, int64_t count, float* out) {
  const int64_t blocks = (count + BLOCK - 1) / BLOCK;
  parallel(rows * blocks, double(rows) * double(count) * 8, [=](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const int64_t row = b / blocks, first = b % blocks * BLOCK;
      const int n = int(count - first < BLOCK ? count - first : BLOCK);
      block(uint64_t(key[row]), first, n, out + row * count + first);
    }
  });
  return 0;
}
