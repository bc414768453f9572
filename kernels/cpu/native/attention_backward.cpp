// Attention backward, fp32, no cache: probabilities are computed anew from the saved log of the row's denominator.
//
// With p = e^(score - lse), delta_i = dout_i . out_i and ds_ij = p_ij (dout_i . v_j - delta_i):
//   dv_j = sum_i p_ij dout_i,  dk_j = sum_i ds_ij q'_i,  dq'_i = sum_j ds_ij k_j,
//   drel'_i,c = sum_j ds_ij proj_c,i-j,  dproj_c,d = sum_i ds_i,i-d rel'_i,c
// where q' = tau scale q and rel' = tau rel. Every sum runs in one fixed order, whatever the thread count: one worker
// owns a (segment, key head), and the segments' shares of dproj are added in ascending order.
#include "attention.h"

namespace {

constexpr int64_t TILE = 16;          // positions taken at once
constexpr int64_t PAD = TILE + 4;     // zeros on both sides of a row of ds, where a shifted view may reach
constexpr int64_t LD = SPLIT + 2 * PAD;
constexpr int64_t BATCH = 64;         // (segment, key head) items whose shares of dproj are held at a time

struct Call {
  const float *q, *k, *v, *rel;  // rows strided by ld*
  int64_t ldq, ldk, ldv, ldrel;
  const float *tau, *out, *lse, *dout;
  int64_t heads, key_heads, width, channels;
  Sight sight;
  float scale;
  float *dq, *dk, *dv, *drel;
  ReversedProj reversed;
  std::vector<float> by_distance;  // rel_proj transposed, [distances, channels]
  int64_t group() const { return heads / key_heads; }
};

// One (segment, key head); its rows are (position, head of the group).
struct Work {
  std::vector<float> q, rel, dout, delta, lse, keys, values, dq, drel, dk, dv, p, ds;
};
thread_local Work work;

// Scores (to p) and dout . v (to ds) of one tile against one split.
struct Products {
  const Call& call;
  Work& x;
  int64_t tile, first;  // positions of the tile's first row and of the split's first key

  template <int POS, int HB> MEMBER void run(int64_t p, int64_t h) {
    constexpr int NV = score_vectors(POS * HB), KEYS = NV * W;
    const int64_t group = call.group(), i = tile + p, row = i * group + h, at = (p * group + h) * LD + PAD;
    const Range head = visible(i, call.sight, first), last = visible(i + POS - 1, call.sight, first);
    if (head.lo >= SPLIT || last.hi <= 0) return;
    const float *keys = &x.keys[size_t(first * call.width)], *values = &x.values[size_t(first * call.width)];
    for (int64_t j = head.lo / KEYS * KEYS; j < last.hi; j += KEYS) {
      score_block<POS, HB, NV, true>(&x.q[size_t(row * call.width)], call.width, keys + j, group, &x.p[size_t(at + j)],
                                     group, LD, x.rel.data() + row * call.channels, call.channels, &call.reversed,
                                     first + j - i);
      score_block<POS, HB, NV, false>(&x.dout[size_t(row * call.width)], call.width, values + j, group,
                                      &x.ds[size_t(at + j)], group, LD);
    }
  }
};

// score -> probability, dout . v -> ds, for the keys the row sees; zeros for the rest of the split
INLINE void finish_row(float* p, float* ds, Range r, float lse, float delta) {
  for (int64_t j = 0; j < SPLIT; j += W) {
    if (j + W <= r.lo || j >= r.hi) {
      store(p + j, zero()), store(ds + j, zero());
      continue;
    }
    vf weight = exp_down(load(p + j) - splat(lse)), grad = weight * (load(ds + j) - splat(delta));
    vi key = splat_int(int(j)) + lane_index();
    vi seen = (key >= splat_int(int(r.lo))) & (key < splat_int(int(r.hi)));
    store(p + j, seen ? weight : zero());
    store(ds + j, seen ? grad : zero());
  }
}

// c += a b for `rows` rows of c, four at a time: c and a must be readable up to a multiple of four rows
INLINE void product(float* c, int64_t ldc, const float* a, int64_t sm, int64_t sk, const float* b, int64_t ldb,
                    int64_t rows, int64_t count, int64_t columns) {
  for (int64_t m = 0; m < rows; m += 4) accumulate<4, 2>(c + m * ldc, ldc, a + m * sm, sm, sk, b, ldb, count, columns);
}

void one_split(const Call& call, Work& x, int64_t tile, int64_t count, int64_t first, const float* k, float* dproj) {
  const int64_t group = call.group(), width = call.width, channels = call.channels, rows = count * group;
  Products products{call, x, tile, first};
  for_blocks(count, group, products);
  for (int64_t p = 0; p < count; p++) {
    const Range r = visible(tile + p, call.sight, first);
    for (int64_t h = 0; h < group; h++) {
      const size_t at = size_t((p * group + h) * LD + PAD), row = size_t((tile + p) * group + h);
      finish_row(&x.p[at], &x.ds[at], r, x.lse[row], x.delta[row]);
    }
  }
  const int64_t lo = visible(tile, call.sight, first).lo & ~int64_t(3);
  const int64_t hi = visible(tile + count - 1, call.sight, first).hi;
  const float *p = x.p.data() + PAD, *ds = x.ds.data() + PAD;
  const float *q = &x.q[size_t(tile * group * width)], *dout = &x.dout[size_t(tile * group * width)];
  product(&x.dv[size_t((first + lo) * width)], width, p + lo, 1, LD, dout, width, hi - lo, rows, width);
  product(&x.dk[size_t((first + lo) * width)], width, ds + lo, 1, LD, q, width, hi - lo, rows, width);
  product(&x.dq[size_t(tile * group * width)], width, ds + lo, LD, 1, k + (first + lo) * call.ldk, call.ldk, rows,
          hi - lo, width);
  // In distance space a row of ds is the same row shifted by its position: a view whose row stride is one longer.
  const int64_t shear = group * LD + 1, known = call.reversed.extent;
  for (int64_t h = 0; h < group; h++) {
    for (int64_t n = 0; n < count; n += 4) {
      const int64_t i = tile + n, from = i - first - SPLIT + 1 > 0 ? i - first - SPLIT + 1 : 0;
      const int64_t to = i + 4 - first < known ? i + 4 - first : known;
      if (from >= to) continue;
      accumulate<4, 2>(x.drel.data() + (i * group + h) * channels, group * channels,
                       ds + (n * group + h) * LD + i - first - from, shear, -1,
                       call.by_distance.data() + from * channels, channels, to - from, channels);
    }
    const int64_t from = tile - first - SPLIT + 1 > 0 ? tile - first - SPLIT + 1 : 0;
    const int64_t to = tile + count - first < known ? tile + count - first : known;
    if (from < to)
      product(dproj + from * channels, channels, ds + h * LD + tile - first - from, -1, shear,
              x.rel.data() + (tile * group + h) * channels, group * channels, to - from, count, channels);
  }
}

void load_work(const Call& call, Work& x, int64_t row, int64_t length, int64_t head) {
  const int64_t group = call.group(), width = call.width, channels = call.channels;
  const size_t rows = size_t((length + TILE - 1) / TILE * TILE * group);
  const size_t keys = size_t((length + SPLIT - 1) / SPLIT * SPLIT * width);
  for (auto* v : {&x.q, &x.dout}) v->resize(rows * size_t(width));
  for (auto* v : {&x.keys, &x.values}) v->resize(keys);
  for (auto* v : {&x.dk, &x.dv}) v->assign(keys, 0.f);
  x.rel.resize(rows * size_t(channels)), x.delta.resize(rows), x.lse.resize(rows);
  x.dq.assign(rows * size_t(width), 0.f), x.drel.assign(rows * size_t(channels), 0.f);
  for (auto* v : {&x.p, &x.ds}) v->assign(size_t(TILE * group * LD), 0.f);
  for (int64_t p = 0; p < length; p++) {
    const int64_t t = row + p;
    const float tau = call.tau ? call.tau[t] : 1.f, scale = tau * call.scale;
    const float* q = call.q + t * call.ldq + head * group * width;
    for (int64_t n = 0; n < group * width; n++) x.q[size_t(p * group * width + n)] = q[n] * scale;
    const float* rel = call.rel + t * call.ldrel + head * group * channels;
    for (int64_t n = 0; n < group * channels; n++) x.rel[size_t(p * group * channels + n)] = rel[n] * tau;
    const int64_t at = t * call.heads + head * group;
    memcpy(&x.lse[size_t(p * group)], call.lse + at, size_t(group) * 4);
    memcpy(&x.dout[size_t(p * group * width)], call.dout + at * width, size_t(group * width) * 4);
    for (int64_t h = 0; h < group; h++) {
      const float *one = call.out + (at + h) * width, *other = call.dout + (at + h) * width;
      F16 acc = splat16(0.f);
      for (int64_t d = 0; d < width; d += LANES) {
        int lanes = width - d < LANES ? int(width - d) : LANES;
        acc = fma(load16(one + d, lanes), load16(other + d, lanes), acc);
      }
      x.delta[size_t(p * group + h)] = sum(acc);
    }
  }
  transpose_splits(call.k + row * call.ldk + head * width, call.ldk, length, width, x.keys.data());
  transpose_splits(call.v + row * call.ldv + head * width, call.ldv, length, width, x.values.data());
}

void store_work(const Call& call, const Work& x, int64_t row, int64_t length, int64_t head) {
  const int64_t group = call.group(), width = call.width, channels = call.channels;
  for (int64_t p = 0; p < length; p++) {
    const int64_t t = row + p, at = t * call.heads + head * group;
    const float tau = call.tau ? call.tau[t] : 1.f, scale = tau * call.scale;
    for (int64_t n = 0; n < group * width; n++) call.dq[at * width + n] = x.dq[size_t(p * group * width + n)] * scale;
    for (int64_t n = 0; n < group * channels; n++)
      call.drel[at * channels + n] = x.drel[size_t(p * group * channels + n)] * tau;
    memcpy(call.dk + (t * call.key_heads + head) * width, &x.dk[size_t(p * width)], size_t(width) * 4);
    memcpy(call.dv + (t * call.key_heads + head) * width, &x.dv[size_t(p * width)], size_t(width) * 4);
  }
}

void one_item(const Call& call, int64_t row, int64_t length, int64_t head, float* dproj) {
  Work& x = work;
  load_work(call, x, row, length, head);
  const float* k = call.k + row * call.ldk + head * call.width;
  for (int64_t tile = 0; tile < length; tile += TILE) {
    const int64_t count = length - tile < TILE ? length - tile : TILE;
    for (int64_t split = call.sight.begin(tile); split * SPLIT < tile + count; split = call.sight.next(split, tile))
      one_split(call, x, tile, count, split * SPLIT, k, dproj);
  }
  store_work(call, x, row, length, head);
}

}  // namespace

// Shapes as in attention_f32; out, dout, dq [T, heads, width], lse [T, heads], dk and dv [T, key_heads, width],
// drel [T, heads, channels], dproj [channels, extent], all contiguous; every gradient is overwritten.
EXPORT int64_t attention_backward(const float* q, int64_t ldq, const float* k, int64_t ldk, const float* v, int64_t ldv,
                                  const float* rel, int64_t ldrel, const float* proj, const float* tau,
                                  const int32_t* offset, int64_t segments, int64_t heads, int64_t key_heads,
                                  int64_t width, int64_t channels, int64_t extent, int64_t window, int64_t kept,
                                  float scale, const float* out, const float* lse, const float* dout, float* dq,
                                  float* dk, float* dv, float* drel, float* dproj) {
  static thread_local Call call;
  call.q = q, call.k = k, call.v = v, call.rel = rel;
  call.ldq = ldq, call.ldk = ldk, call.ldv = ldv, call.ldrel = ldrel;
  call.tau = tau, call.out = out, call.lse = lse, call.dout = dout, call.scale = scale;
  call.heads = heads, call.key_heads = key_heads, call.width = width, call.channels = channels;
  call.sight = {window, kept};
  call.dq = dq, call.dk = dk, call.dv = dv, call.drel = drel;
  std::vector<int32_t> zeros(size_t(segments + 1), 0);
  const Segs segs{zeros.data(), zeros.data(), offset, segments};
  const int64_t known = distances(segs, extent, call.sight);
  call.reversed.build(proj, extent, channels, known);
  call.by_distance.resize(size_t(known * channels));
  for (int64_t c = 0; c < channels; c++)
    for (int64_t d = 0; d < known; d++) call.by_distance[size_t(d * channels + c)] = proj[c * extent + d];

  const int64_t items = segments * key_heads, share = (known + 4) * channels;
  std::vector<float> shares, total(size_t(share), 0.f);
  const Call& shared = call;
  const double pairs = work_pairs(segs, call.sight) * double(heads * (6 * width + 3 * channels));
  for (int64_t begin = 0; begin < items; begin += BATCH) {
    const int64_t held = items - begin < BATCH ? items - begin : BATCH;
    shares.assign(size_t(held * share), 0.f);
    parallel(held, pairs * 0.03 * double(held) / double(items), [&](int64_t from, int64_t to) {
      for (int64_t n = from; n < to; n++) {
        const int64_t s = (begin + n) / key_heads;
        one_item(shared, offset[s], segs.length(s), (begin + n) % key_heads, shares.data() + n * share);
      }
    });
    for (int64_t n = 0; n < held; n++)
      for (int64_t m = 0; m < share; m++) total[size_t(m)] += shares[size_t(n * share + m)];
  }
  for (int64_t c = 0; c < channels; c++)
    for (int64_t d = 0; d < extent; d++) dproj[c * extent + d] = d < known ? total[size_t(d * channels + c)] : 0.f;
  return 0;
}
