// The one matrix kernel behind linear, expert_linear and their gradients.
//
// Every output element is a single chain acc = fma(a, b, acc) over ascending k from 0, whatever the number of rows, the
// tile it falls into, the thread or the instruction set: so equal inputs give equal bits by construction. Tiles are
// only over rows and columns; there is no split over k (a k block that ends goes on from its stored fp32 value).
//
// B is packed in panels of 16 columns, panel[k][16], zero-padded at the last. A tile is MR rows by NP panels; few rows
// take more panels, so that enough independent chains hide the latency of fma.
#pragma once

#include <stdlib.h>

#include "vec.h"

constexpr int PANEL = 16;  // columns
constexpr int MR_MAX = 6;  // rows of a tile
constexpr int BLOCK_ROWS = 96;
constexpr int NP_BY_ROWS_AVX2[] = {0, 4, 3, 2, 1, 1, 1};
constexpr int NP_BY_ROWS_AVX512[] = {0, 8, 4, 4, 4, 4, 4};
constexpr const int* NP_BY_ROWS = W == 8 ? NP_BY_ROWS_AVX2 : NP_BY_ROWS_AVX512;

INLINE int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

// Heap memory for one call. malloc keeps freed blocks, so this is cheap.
struct Scratch {
  void* p;
  explicit Scratch(int64_t bytes) : p(aligned_alloc(64, size_t(bytes + 63) & ~size_t(63))) {}
  ~Scratch() { free(p); }
  Scratch(const Scratch&) = delete;
  template <class T> T* as() { return static_cast<T*>(p); }
};

// c[i][0 : columns] (+)= sum_k a[i][k * A_STEP] * b[k][...] for MR rows and NP panels `stride` elements apart.
template <int MR, int NP, int A_STEP, bool RESUME, class B, class C>
INLINE void tile(int64_t k_size, const float* const* a, const B* b, int64_t stride, C* const* c, int64_t first,
                 int64_t columns) {
  constexpr int V = NP * PARTS;
  vf acc[MR][V];
  const float* rows[MR];
  for (int i = 0; i < MR; i++) {
    rows[i] = a[i];
    for (int v = 0; v < V; v++) {
      if constexpr (RESUME) {
        int64_t left = columns - first - v * W;
        const float* p = (const float*)c[i] + first + v * W;
        acc[i][v] = left >= W ? load(p) : left > 0 ? load(p, int(left)) : zero();
      } else {
        acc[i][v] = zero();
      }
    }
  }
  for (int64_t k = 0; k < k_size; k++) {
    vf bv[V];
    for (int v = 0; v < V; v++) bv[v] = load(b + (v / PARTS) * stride + k * PANEL + (v % PARTS) * W);
    for (int i = 0; i < MR; i++) {
      vf av = splat(rows[i][k * A_STEP]);
      for (int v = 0; v < V; v++) acc[i][v] = fma(av, bv[v], acc[i][v]);
    }
  }
  for (int i = 0; i < MR; i++) {
    for (int v = 0; v < V; v++) {
      int64_t left = columns - first - v * W;
      if (left >= W) store(c[i] + first + v * W, acc[i][v]);
      else if (left > 0) store(c[i] + first + v * W, acc[i][v], int(left));
    }
  }
}

// MR rows over panels [p0, p1), NP panels at a time, then what is left with fewer.
template <int MR, int NP, int A_STEP, bool RESUME, class B, class C>
INLINE void row_tile(int64_t k_size, const float* const* a, const B* b, C* const* c, int64_t p0, int64_t p1,
                     int64_t columns) {
  const int64_t stride = k_size * PANEL;
  int64_t p = p0;
  for (; p + NP <= p1; p += NP) {
    tile<MR, NP, A_STEP, RESUME>(k_size, a, b + p * stride, stride, c, p * PANEL, columns);
  }
  if constexpr (NP > 1) {
    if (p < p1) row_tile<MR, NP == 3 ? 2 : NP / 2, A_STEP, RESUME>(k_size, a, b, c, p, p1, columns);
  }
}

template <int A_STEP, bool RESUME, class B, class C>
static void any_row_tile(int rows, int64_t k_size, const float* const* a, const B* b, C* const* c, int64_t p0,
                         int64_t p1, int64_t columns) {
  switch (rows) {
    case 1: return row_tile<1, NP_BY_ROWS[1], A_STEP, RESUME>(k_size, a, b, c, p0, p1, columns);
    case 2: return row_tile<2, NP_BY_ROWS[2], A_STEP, RESUME>(k_size, a, b, c, p0, p1, columns);
    case 3: return row_tile<3, NP_BY_ROWS[3], A_STEP, RESUME>(k_size, a, b, c, p0, p1, columns);
    case 4: return row_tile<4, NP_BY_ROWS[4], A_STEP, RESUME>(k_size, a, b, c, p0, p1, columns);
    case 5: return row_tile<5, NP_BY_ROWS[5], A_STEP, RESUME>(k_size, a, b, c, p0, p1, columns);
    case 6: return row_tile<6, NP_BY_ROWS[6], A_STEP, RESUME>(k_size, a, b, c, p0, p1, columns);
  }
}

// `rows` (at most BLOCK_ROWS) rows given by pointer, over panels [p0, p1) of b [panels][k][16].
template <class B, class C>
INLINE void block(int rows, int64_t k_size, const float* const* a, const B* b, C* const* c, int64_t p0, int64_t p1,
                  int64_t columns) {
  if (rows <= MR_MAX) {
    any_row_tile<1, false>(rows, k_size, a, b, c, p0, p1, columns);
    return;
  }
  int tiles = (rows + MR_MAX - 1) / MR_MAX;
  // A panel group stays in the first-level cache while all row tiles pass over it.
  const int64_t group = NP_BY_ROWS[MR_MAX];
  for (int64_t p = p0; p < p1; p += group) {
    int64_t end = p + group < p1 ? p + group : p1;
    for (int t = 0; t < tiles; t++) {
      int begin = rows * t / tiles, count = rows * (t + 1) / tiles - begin;
      any_row_tile<1, false>(count, k_size, a + begin, b, c + begin, p, end, columns);
    }
  }
}

// Rows of a block such that they fit beside a panel in the first-level cache.
INLINE int block_rows(int64_t k_size) {
  int64_t rows = 24 * 1024 / (4 * (k_size + 1)) / MR_MAX * MR_MAX;
  return int(rows < 4 * MR_MAX ? 4 * MR_MAX : rows > BLOCK_ROWS ? BLOCK_ROWS : rows);
}
