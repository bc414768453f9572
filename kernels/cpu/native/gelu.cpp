// GELU, forward and backward: gelu(x) = x Phi(x), Phi the normal distribution's function.
//
// With a = |x|, gelu(x) = max(x, 0) - T(a), T(a) = a Phi(-a), for either sign of x; so nothing cancels where gelu is
// small. And T(a) = exp(-a^2/2) G(a), where G is smooth and without an exponential, as in Cody's erfc (Mathematics of
// Computation 23, 1969). G is a polynomial of degree 7 on each of eight intervals, our own minimax fits (Remez'
// exchange with 40 digits, relative error 1e-8). gelu's derivative for x = -a has the same form with another G.
//
// Measured (tests/kernels/test_gelu.py): gelu within 2 ulp for every x, denormal results included; its derivative
// within 2^-23, and within 2 ulp for |x| >= 1.5.
#include "vec.h"

constexpr float END = 14.75f;  // where T is 0 in fp32, and so is the derivative at -END

// The eight intervals of a: [1, 2), [2, 3), [3, 5), [5, 7), [7, 11), [11, 15), [0, 0.5), [0.5, 1). They are told apart
// by exponent and first bit of a + 1, and their order here is that of these bits modulo 8.
constexpr float MIDDLE[8] = {1.5f, 2.5f, 4.f, 6.f, 9.f, 13.f, 0.f, 0.75f};

struct Pieces {
  float coefficient[8][8];  // of (a - MIDDLE)^7 first; a column each interval
};
constexpr Pieces TAIL = {{  // exp(a^2/2) a Phi(-a)
    {2.28322504e-4f, 2.70798446e-5f, 2.06538175e-6f, 1.23522071e-7f,
     5.69355008e-9f, 2.50262283e-10f, 5.62861888e-3f, 1.36191561e-3f},
    {-7.45149970e-4f, -1.04823703e-4f, -9.92068999e-6f, -7.73726583e-7f,
     -4.82954654e-8f, -2.95638580e-9f, -2.36551799e-2f, -3.92780500e-3f},
    {2.20772112e-3f, 3.73804069e-4f, 4.24240425e-5f, 4.48270339e-6f,
     3.62916751e-7f, 3.25154623e-8f, 6.15449846e-2f, 1.04705617e-2f},
    {-6.32648496e-3f, -1.28661632e-3f, -1.87205660e-4f, -2.61048863e-5f,
     -2.94458982e-6f, -3.66438712e-7f, -1.32816941e-1f, -2.59122103e-2f},
    {1.64416861e-2f, 4.07042308e-3f, 7.71075429e-4f, 1.43372468e-4f,
     2.27546243e-5f, 3.94551898e-6f, 2.49986380e-1f, 5.74400686e-2f},
    {-3.74912210e-2f, -1.14934128e-2f, -2.87625403e-3f, -7.23556383e-4f,
     -1.62453507e-4f, -3.95689494e-5f, -3.98941845e-1f, -1.10053018e-1f},
    {7.03737363e-2f, 2.72964519e-2f, 9.21177492e-3f, 3.18094739e-3f,
     1.02016260e-3f, 3.50818940e-4f, 5.00000000e-1f, 1.69906512e-1f},
    {3.08670998e-1f, 3.53328317e-1f, 3.77642572e-1f, 3.88675898e-1f,
     3.94189090e-1f, 3.96622390e-1f, 0.f, 2.25174353e-1f},
}};
constexpr Pieces SLOPE = {{  // exp(a^2/2) (Phi(-a) - a phi(a))
    {-1.10251865e-4f, -1.51628883e-5f, -1.44882461e-6f, -1.11696039e-7f,
     -7.03906800e-9f, -4.26497948e-10f, -1.93917286e-3f, -5.60076034e-4f},
    {3.82091588e-4f, 6.39912396e-5f, 7.58595297e-6f, 7.77990181e-7f,
     6.61728521e-8f, 5.66950886e-9f, 9.05733276e-3f, 1.76549272e-3f},
    {-1.26363325e-3f, -2.57240928e-4f, -3.73858602e-5f, -5.21893980e-6f,
     -5.87939951e-7f, -7.32586329e-8f, -2.60412209e-2f, -5.18255774e-3f},
    {4.10824222e-3f, 1.01734209e-3f, 1.92447871e-4f, 3.58238358e-5f,
     5.67446887e-6f, 9.85754355e-7f, 6.23703338e-2f, 1.43592712e-2f},
    {-1.24972817e-2f, -3.83114815e-3f, -9.58778954e-4f, -2.41186470e-4f,
     -5.41531263e-5f, -1.31897086e-5f, -1.32963970e-1f, -3.66843343e-2f},
    {3.51869762e-2f, 1.36482390e-2f, 4.60595125e-3f, 1.59047754e-3f,
     5.10092650e-4f, 1.75409979e-4f, 2.49998912e-1f, 8.49532634e-2f},
    {-4.89213556e-1f, -4.44556236e-1f, -4.20241982e-1f, -4.09208685e-1f,
     -4.03695464e-1f, -4.01262164e-1f, -7.97884524e-1f, -5.72710216e-1f},
    {-3.92632753e-1f, -8.56024384e-1f, -1.50135851f, -2.32887435f,
     -3.54668164f, -5.15574026f, 5.00000000e-1f, 1.02575205e-3f},
}};

// exp(-a^2/2) G(a), a = |x|. No rounding but the last is larger than a fraction of an ulp: a^2 is exact, in two parts,
// and the polynomial's last step is kept in two.
INLINE vf weighted(vf x, const Pieces& pieces) {
  vf a = min((vf)((vu)x & 0x7fffffffu), splat(END));  // END of a NaN
  vi piece = (vi)((vu)(a + splat(1.f)) >> 22);
  vf u = a - pick(MIDDLE, piece), h = pick(pieces.coefficient[0], piece);
  for (int i = 1; i < 7; i++) h = fma(h, u, pick(pieces.coefficient[i], piece));
  vf last = pick(pieces.coefficient[7], piece), g = fma(h, u, last), g_low = fma(h, u, last - g);
  // a^2 = q - n 2 ln2, |q| <= ln2, n whole: adding 1.5 2^23 rounds to it and leaves it in the last bits.
  vf square = a * a, square_low = fma(a, a, -square);
  vf rounded = fma(square, splat(-0.721347520f), splat(12582912.f)), n = rounded - splat(12582912.f);
  vf q = fma(n, splat(1.38629150390625f), square) + fma(n, splat(2.85721364e-6f), square_low);
  // p = exp(-q/2) - 1, another minimax fit, error 1e-8
  vf p = fma(splat(2.17913275e-5f), q, splat(-2.61455571e-4f));
  p = fma(p, q, splat(2.60414253e-3f));
  p = fma(p, q, splat(-2.08331794e-2f));
  p = fma(p, q, splat(0.125f));
  p = fma(p, q, splat(-0.5f)) * q;
  // times 2^n, first exactly 2^(n + 64): a denormal result is rounded once
  vf power = (vf)(((vu)rounded + (64 + 127)) << 23);
  return (g + fma(g, p, g_low)) * power * splat(0x1p-64f);
}

// x - x is 0, or NaN for NaN and for -inf, of which the definition is -inf times 0.
INLINE vf gelu(vf x) { return (x > zero() ? x : x - x) - weighted(x, TAIL); }

// Phi(x) + x phi(x), whose values at x and -x sum to 1. NaN for an infinite x: infinity times 0.
INLINE vf slope(vf x) {
  vf low = weighted(x, SLOPE);
  return (x > zero() ? splat(1.f) - low : low) + (x - x);
}

// x [rows, width] with row stride ldx -> y [rows, width]. Whole vectors without masks, which take a tenth longer.
template <class T> INLINE void gelu(const T* x, int64_t ldx, T* y, int64_t rows, int64_t width) {
  parallel(rows, double(rows * width) * 0.6, [=](int64_t begin, int64_t end) {
    const int64_t whole = width / W * W, rest = width - whole;
    for (int64_t r = begin; r < end; r++) {
      const T* row = x + r * ldx;
      T* out = y + r * width;
      for (int64_t i = 0; i < whole; i += W) store(out + i, gelu(load(row + i)));
      if (rest) store(out + whole, gelu(load(row + whole, int(rest))), int(rest));
    }
  });
}
EXPORT int64_t gelu_f32(const float* x, int64_t ldx, float* y, int64_t rows, int64_t width) {
  gelu(x, ldx, y, rows, width);
  return 0;
}
EXPORT int64_t gelu_bf16(const bf16* x, int64_t ldx, bf16* y, int64_t rows, int64_t width) {
  gelu(x, ldx, y, rows, width);
  return 0;
}

EXPORT int64_t gelu_backward(const float* x, int64_t ldx, const float* dy, float* dx, int64_t rows, int64_t width) {
  parallel(rows, double(rows * width) * 0.6, [=](int64_t begin, int64_t end) {
    const int64_t whole = width / W * W, rest = width - whole;
    for (int64_t r = begin; r < end; r++) {
      const float *row = x + r * ldx, *d = dy + r * width;
      float* out = dx + r * width;
      for (int64_t i = 0; i < whole; i += W) store(out + i, load(d + i) * slope(load(row + i)));
      int m = int(rest);
      if (rest) store(out + whole, load(d + whole, m) * slope(load(row + whole, m)), m);
    }
  });
  return 0;
}
