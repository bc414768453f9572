// dMel: windows of 1600 samples to magnitudes, mel sums and codes, in fp64 without a fused operation.
//
// kernels/reference/dmel.py and kernels/fourier.py define every operation and its order. This code does the same ones,
// one frame a lane, so it gives their bits on every instruction set, and no frame depends on its neighbours.
#include <stdlib.h>

#include "gemm.h"

namespace {

typedef double vd __attribute__((vector_size(4 * W), may_alias));
constexpr int FRAMES = W / 2;  // lanes of a vd
constexpr int WINDOW = 1600, HALF = WINDOW / 2;
constexpr int TOGETHER = 4;  // filters summed side by side, so that one's additions hide the latency of another's

INLINE vd splatd(double x) { return x - vd{}; }
#ifdef __AVX512F__
INLINE vd root_of(vd x) { return (vd)_mm512_sqrt_pd((__m512d)x); }
#else
INLINE vd root_of(vd x) { return (vd)_mm256_sqrt_pd((__m256d)x); }
#endif

struct Complex {
  vd re, im;
};
INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
INLINE Complex operator*(double x, Complex a) { return {splatd(x) * a.re, splatd(x) * a.im}; }
INLINE Complex plus_i(Complex a, Complex b) { return {a.re - b.im, a.im + b.re}; }   // a + i b
INLINE Complex minus_i(Complex a, Complex b) { return {a.re + b.im, a.im - b.re}; }  // a - i b
INLINE Complex times(Complex a, const double* root) {
  const vd c = splatd(root[0]), s = splatd(root[1]);
  return {a.re * c - a.im * s, a.re * s + a.im * c};
}

template <int R> INLINE void butterfly(Complex* a, const double* roots) {
  if constexpr (R == 2) {
    const Complex sum = a[0] + a[1];
    a[1] = a[0] - a[1], a[0] = sum;
  } else if constexpr (R == 4) {
    const Complex even = a[0] + a[2], odd = a[1] + a[3], d = a[0] - a[2], e = a[1] - a[3];
    a[0] = even + odd, a[1] = minus_i(d, e), a[2] = even - odd, a[3] = plus_i(d, e);
  } else {
    const double *w1 = roots + 2 * (WINDOW / 5), *w2 = roots + 2 * (2 * WINDOW / 5);
    const double c1 = w1[0], s1 = w1[1], c2 = w2[0], s2 = w2[1];
    const Complex p = a[1] + a[4], q = a[2] + a[3], d = a[1] - a[4], e = a[2] - a[3];
    const Complex m = (a[0] + c1 * p) + c2 * q, n = (a[0] + c2 * p) + c1 * q;
    const Complex u = s1 * d + s2 * e, v = s2 * d - s1 * e;
    a[0] = a[0] + (p + q), a[1] = plus_i(m, u), a[2] = plus_i(n, v), a[3] = minus_i(n, v), a[4] = minus_i(m, u);
  }
}

// One of Stockham's passes over HALF numbers: what is left to transform has length n, in `stride` interleaved copies.
template <int R> INLINE void pass(const Complex* in, Complex* out, int n, const double* roots) {
  const int m = n / R, stride = HALF / n;
  for (int p = 0; p < m; p++) {
    for (int q = 0; q < stride; q++) {
      Complex a[R];
      for (int j = 0; j < R; j++) a[j] = in[q + stride * (p + m * j)];
      butterfly<R>(a, roots);
      Complex* to = out + q + stride * R * p;
      to[0] = a[0];
      for (int k = 1; k < R; k++) to[stride * k] = m > 1 ? times(a[k], roots + 2 * (2 * stride * p * k)) : a[k];
    }
  }
}

// What a call's frames have in common.
struct Tables {
  const double *window, *roots;
  const int64_t* first;
  const double* weight;
  int64_t channels, longest;
  const double* edges;
  int64_t edge_count;
};

// Frames of WINDOW samples at `from` -> codes and mel values [channels] each at `code` and `mel`; of `count` < FRAMES
// the first ones are written. z and other have HALF numbers, magnitude HALF + t.longest.
INLINE void block(const float* const* from, int count, const Tables& t, Complex* z, Complex* other, vd* magnitude,
                  uint8_t* code, double* mel) {
  for (int i = 0; i < HALF; i++) {
    for (int lane = 0; lane < FRAMES; lane++) {
      z[i].re[lane] = double(from[lane][2 * i]);
      z[i].im[lane] = double(from[lane][2 * i + 1]);
    }
    z[i].re *= splatd(t.window[2 * i]), z[i].im *= splatd(t.window[2 * i + 1]);
  }
  pass<5>(z, other, 800, t.roots);
  pass<5>(other, z, 160, t.roots);
  pass<4>(z, other, 32, t.roots);
  pass<4>(other, z, 8, t.roots);
  pass<2>(z, other, 2, t.roots);
  for (int k = 1; k < HALF; k++) {  // the bins of the real transform; 0 and HALF are in no filter
    const Complex a = other[k], b = other[HALF - k], mirror = {b.re, -b.im};
    const Complex sum = a + mirror, difference = a - mirror;
    const Complex even = 0.5 * sum, odd = 0.5 * Complex{difference.im, -difference.re};
    const Complex x = even + times(odd, t.roots + 2 * k);
    const vd power = x.re * x.re + x.im * x.im, floor = splatd(1e-10);
    magnitude[k] = root_of(power > floor ? power : floor);
  }
  for (int64_t c = 0; c < t.channels; c += TOGETHER) {
    vd sum[TOGETHER] = {};
    const int group = t.channels - c < TOGETHER ? int(t.channels - c) : TOGETHER;
    const vd* bins[TOGETHER];
    const double* weight[TOGETHER];
    for (int g = 0; g < TOGETHER; g++) {
      const int64_t f = c + (g < group ? g : 0);
      bins[g] = magnitude + t.first[f], weight[g] = t.weight + f * t.longest;
    }
    for (int64_t j = 0; j < t.longest; j++) {
      for (int g = 0; g < TOGETHER; g++) sum[g] += splatd(weight[g][j]) * bins[g][j];
    }
    for (int g = 0; g < group; g++) {
      decltype(sum[g] > sum[g]) reached = {};
      for (int64_t e = 0; e < t.edge_count; e++) reached -= sum[g] >= splatd(t.edges[e]);  // true is -1
      for (int lane = 0; lane < count; lane++) {
        code[lane * t.channels + c + g] = uint8_t(reached[lane]), mel[lane * t.channels + c + g] = sum[g][lane];
      }
    }
  }
}

}  // namespace

// samples [sessions, ld], finite; frame i of a session begins at its sample i * hop. roots [1600, 2]; first [channels],
// from 1 on; weight [channels, longest], first + the filter's length at most 800. code and mel [sessions, frames, channels].
EXPORT int64_t dmel_codes(const float* samples, int64_t sessions, int64_t ld, int64_t frames, int64_t hop,
                          const double* window, const double* roots, const int64_t* first, const double* weight,
                          int64_t channels, int64_t longest, const double* edges, int64_t edge_count, uint8_t* code,
                          double* mel) {
  const Tables t = {window, roots, first, weight, channels, longest, edges, edge_count};
  const int64_t count = sessions * frames, blocks = (count + FRAMES - 1) / FRAMES;
  parallel(blocks, double(count) * 3e3, [=](int64_t begin, int64_t end) {
    Scratch scratch((2 * HALF * 2 + HALF + longest) * int64_t(sizeof(vd)) + WINDOW * 4);
    Complex *z = scratch.as<Complex>(), *other = z + HALF;
    vd* magnitude = (vd*)(other + HALF);
    float* silence = (float*)(magnitude + HALF + longest);  // what the lanes after the last frame read
    memset((void*)magnitude, 0, size_t(HALF + longest) * sizeof(vd) + WINDOW * 4);
    for (int64_t b = begin; b < end; b++) {
      const float* from[FRAMES];
      const int64_t at = b * FRAMES, here = count - at < FRAMES ? count - at : FRAMES;
      for (int64_t lane = 0; lane < FRAMES; lane++) {
        const int64_t f = at + lane;
        from[lane] = lane < here ? samples + f / frames * ld + f % frames * hop : silence;
      }
      block(from, int(here), t, z, other, magnitude, code + at * channels, mel + at * channels);
    }
  });
  return 0;
}
