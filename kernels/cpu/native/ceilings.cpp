// What the machine can do at most, for kernels.tools.bench to stand its figures against: bytes read and multiply-adds.
#include "vec.h"

// Reads n floats (a ragged end of up to 64 * streams * threads is skipped) and returns bits of their sum, so that the
// loads cannot be optimised away. Each thread reads several streams side by side, as a product of one row reads several
// panels: one stream alone does not keep the memory busy.
EXPORT int64_t ceiling_read(const float* x, int64_t n) {
  constexpr int STREAMS = 4, UNROLL = 2;
  int64_t bits = 0;
#pragma omp parallel reduction(^ : bits)
  {
    const int64_t i = omp_get_thread_num(), count = omp_get_num_threads(), length = n / (count * STREAMS);
    const float* p = x + length * STREAMS * i;
    vf acc[STREAMS * UNROLL] = {};
    for (int64_t at = 0; at + UNROLL * W <= length; at += UNROLL * W)
      for (int s = 0; s < STREAMS; s++)
        for (int u = 0; u < UNROLL; u++)
          acc[s * UNROLL + u] = acc[s * UNROLL + u] + load(p + s * length + at + u * W);
    for (int v = 1; v < STREAMS * UNROLL; v++) acc[0] = acc[0] + acc[v];
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
