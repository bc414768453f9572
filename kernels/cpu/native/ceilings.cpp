// What the machine can do at most, for kernels.bench to stand its figures against: bytes read and multiply-adds.
#include "vec.h"

// Reads n floats (a multiple of 64 * threads is exact, a ragged end is skipped) and returns bits of their sum, so that
// the loads cannot be optimised away.
EXPORT int64_t ceiling_read(const float* x, int64_t n) {
  int64_t bits = 0;
#pragma omp parallel reduction(^ : bits)
  {
    const int64_t i = omp_get_thread_num(), count = omp_get_num_threads();
    const float *p = x + n / count * i, *end = p + n / count;
    vf acc[8] = {};
    for (; p + 8 * W <= end; p += 8 * W)
      for (int v = 0; v < 8; v++) acc[v] = acc[v] + load(p + v * W);
    for (int v = 1; v < 8; v++) acc[0] = acc[0] + acc[v];
    bits ^= float_bits(acc[0][0]);
  }
  return bits;
}

// `steps` times 12 independent vector fma on every thread: 24 * W * steps * threads floating-point operations.
EXPORT int64_t ceiling_fma(int64_t steps) {
  int64_t bits = 0;
#pragma omp parallel reduction(^ : bits)
  {
    vf acc[12], a = splat(0.999f), b = splat(1e-3f);
    for (int v = 0; v < 12; v++) acc[v] = splat(float(v));
    for (int64_t s = 0; s < steps; s++)
      for (int v = 0; v < 12; v++) acc[v] = fma(acc[v], a, b);
    for (int v = 1; v < 12; v++) acc[0] = acc[0] + acc[v];
    bits ^= float_bits(acc[0][0]);
  }
  return bits;
}

EXPORT int64_t ceiling_lanes() { return W; }
