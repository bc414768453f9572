// The one matrix kernel behind linear, expert_linear and their gradients.
//
// Every output element is a single chain acc = fma(a, b, acc) over ascending k from 0, whatever the number of rows, the
// tile it falls into, the thread or the instruction set: so equal inputs give equal bits by construction. Tiles are
// only over rows and columns; there is no split over k (a k block that ends goes on from its stored fp32 value).
//
// B is packed in panels of 16 columns, zero-padded at the last: panel[k][16] in fp32, panel[k / 2][16][k % 2] in bf16,
// where a 32-bit lane then holds two neighbouring k of one column and both widen without a shuffle. A tile is MR rows by NP panels; few rows
// take more panels, so that enough independent chains hide the latency of fma. Many rows go through k in stretches of
// DEPTH, so that a panel's stretch stays in the first-level cache and the rows' stretch in the second; between stretches
// a chain rests in fp32.
#pragma once

#include <stdlib.h>

#include "vec.h"

constexpr int PANEL = 16;  // columns
constexpr int MR_MAX = 6;  // rows of a tile
constexpr int BLOCK_ROWS = 192;
constexpr int64_t DEPTH = 256;
constexpr int NP_BY_ROWS_AVX2[] = {0, 4, 3, 2, 1, 1, 1};
constexpr int NP_BY_ROWS_AVX2_PAIRS[] = {0, 4, 2, 2, 1, 1, 1};  // pairs need registers of their own
constexpr int NP_BY_ROWS_AVX512[] = {0, 8, 4, 4, 4, 4, 4};
template <class B> constexpr int panels_at_once(int rows) {
  return (W == 16 ? NP_BY_ROWS_AVX512 : sizeof(B) == 4 ? NP_BY_ROWS_AVX2 : NP_BY_ROWS_AVX2_PAIRS)[rows];
}
constexpr int GROUP = panels_at_once<float>(MR_MAX);  // panels that a tile of many rows takes

INLINE int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

// Elements of a panel, and where in it the element of row k and column c lies.
template <class B> INLINE int64_t panel_size(int64_t k_size) { return (sizeof(B) == 4 ? k_size : k_size + k_size % 2) * PANEL; }
INLINE int64_t panel_at(const float*, int64_t k, int64_t c) { return k * PANEL + c; }
INLINE int64_t panel_at(const bf16*, int64_t k, int64_t c) { return (k / 2 * PANEL + c) * 2 + k % 2; }

// Lanes of two bf16 each: the lower ones are of the smaller k.
INLINE vi load_pairs(const bf16* p) {
  vi x;
  memcpy(&x, p, sizeof x);
  return x;
}
INLINE vf lower(vi pairs) { return (vf)(pairs << 16); }
INLINE vf upper(vi pairs) { return (vf)(pairs & splat_int(int32_t(0xffff0000))); }

// Heap memory for one call. malloc keeps freed blocks, so this is cheap.
struct Scratch {
  void* p;
  explicit Scratch(int64_t bytes) : p(aligned_alloc(64, size_t(bytes + 63) & ~size_t(63))) {}
  ~Scratch() { free(p); }
  Scratch(const Scratch&) = delete;
  template <class T> T* as() { return static_cast<T*>(p); }
};

// FAR: the panels come from afar, not from a cache that the caller has filled, so each tile asks for the next panel as it
// goes (one past the last is never read, and asking for an address that is not there does no harm).
// c[i][0 : columns] (+)= sum_k a[i][k * A_STEP] * b[k][...] for MR rows and NP panels `stride` elements apart.
template <int MR, int NP, int A_STEP, bool RESUME, bool FAR, class B, class C>
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
  if constexpr (sizeof(B) == 4) {
    for (int64_t k = 0; k < k_size; k++) {
      if (FAR && NP == 1) __builtin_prefetch(b + stride + k * PANEL, 0, 2);
      vf bv[V];
      for (int v = 0; v < V; v++) bv[v] = load(b + (v / PARTS) * stride + k * PANEL + (v % PARTS) * W);
      for (int i = 0; i < MR; i++) {
        vf av = splat(rows[i][k * A_STEP]);
        for (int v = 0; v < V; v++) acc[i][v] = fma(av, bv[v], acc[i][v]);
      }
    }
  } else {
    auto pairs = [&](int64_t k, int v) { return load_pairs(b + (v / PARTS) * stride + k * PANEL + (v % PARTS) * W * 2); };
    int64_t k = 0;
    for (; k + 2 <= k_size; k += 2) {
      if (FAR && NP == 1) __builtin_prefetch(b + stride + k * PANEL, 0, 2);
      if constexpr (MR <= 3) {  // column by column: the widened halves of all columns would not fit the registers
        for (int v = 0; v < V; v++) {
          vi both = pairs(k, v);
          for (int i = 0; i < MR; i++) acc[i][v] = fma(splat(rows[i][k * A_STEP]), lower(both), acc[i][v]);
          for (int i = 0; i < MR; i++) acc[i][v] = fma(splat(rows[i][(k + 1) * A_STEP]), upper(both), acc[i][v]);
        }
      } else {
        vi both[V];
        for (int v = 0; v < V; v++) both[v] = pairs(k, v);
        for (int i = 0; i < MR; i++)
          for (int v = 0; v < V; v++) acc[i][v] = fma(splat(rows[i][k * A_STEP]), lower(both[v]), acc[i][v]);
        for (int i = 0; i < MR; i++)
          for (int v = 0; v < V; v++) acc[i][v] = fma(splat(rows[i][(k + 1) * A_STEP]), upper(both[v]), acc[i][v]);
      }
    }
    if (k < k_size)
      for (int v = 0; v < V; v++)
        for (int i = 0; i < MR; i++) acc[i][v] = fma(splat(rows[i][k * A_STEP]), lower(pairs(k, v)), acc[i][v]);
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
// Panels lie `stride` elements apart.
template <int MR, int NP, int A_STEP, bool RESUME, bool FAR, class B, class C>
INLINE void row_tile(int64_t k_size, const float* const* a, const B* b, int64_t stride, C* const* c, int64_t p0,
                     int64_t p1, int64_t columns) {
  int64_t p = p0;
  for (; p + NP <= p1; p += NP) {
    tile<MR, NP, A_STEP, RESUME, FAR>(k_size, a, b + p * stride, stride, c, p * PANEL, columns);
  }
  if constexpr (NP > 1) {
    if (p < p1) row_tile<MR, NP == 3 ? 2 : NP / 2, A_STEP, RESUME, FAR>(k_size, a, b, stride, c, p, p1, columns);
  }
}

template <int A_STEP, bool RESUME, bool FAR, class B, class C>
static void any_row_tile(int rows, int64_t k_size, const float* const* a, const B* b, int64_t stride, C* const* c,
                         int64_t p0, int64_t p1, int64_t columns) {
  switch (rows) {
    case 1: return row_tile<1, panels_at_once<B>(1), A_STEP, RESUME, FAR>(k_size, a, b, stride, c, p0, p1, columns);
    case 2: return row_tile<2, panels_at_once<B>(2), A_STEP, RESUME, FAR>(k_size, a, b, stride, c, p0, p1, columns);
    case 3: return row_tile<3, panels_at_once<B>(3), A_STEP, RESUME, FAR>(k_size, a, b, stride, c, p0, p1, columns);
    case 4: return row_tile<4, panels_at_once<B>(4), A_STEP, RESUME, FAR>(k_size, a, b, stride, c, p0, p1, columns);
    case 5: return row_tile<5, panels_at_once<B>(5), A_STEP, RESUME, FAR>(k_size, a, b, stride, c, p0, p1, columns);
    case 6: return row_tile<6, panels_at_once<B>(6), A_STEP, RESUME, FAR>(k_size, a, b, stride, c, p0, p1, columns);
  }
}

// Up to BLOCK_ROWS rows given by pointer, over panels [p0, p1), in tiles of up to six rows; before each tile of a panel
// group ahead(tile, tiles, first row of the next tile) may ask for what comes next.
template <bool RESUME, bool FAR, class B, class C, class Ahead>
INLINE void block(int rows, int64_t k_size, const float* const* a, const B* b, int64_t stride, C* const* c, int64_t p0,
                  int64_t p1, int64_t columns, Ahead ahead) {
  if (rows <= MR_MAX) {
    any_row_tile<1, RESUME, FAR>(rows, k_size, a, b, stride, c, p0, p1, columns);
    return;
  }
  const int tiles = (rows + MR_MAX - 1) / MR_MAX;
  // A panel group stays in the first-level cache while all row tiles pass over it.
  for (int64_t p = p0; p < p1; p += GROUP) {
    const int64_t end = p + GROUP < p1 ? p + GROUP : p1;
    for (int t = 0; t < tiles; t++) {
      const int begin = rows * t / tiles, next = rows * (t + 1) / tiles;
      ahead(t, tiles, next);
      any_row_tile<1, RESUME, FAR>(next - begin, k_size, a + begin, b, stride, c + begin, p, end, columns);
    }
  }
}
