// The mixture's router: top-k of the biased sigmoids, weights over the chosen and the shared experts. fp32 rows.
#include <vector>

#include "vec.h"

namespace {

thread_local std::vector<float> row_scratch;

// logistic function and its log, without overflow for large |x|
INLINE vf sigmoid(vf x) { return splat(1.f) / (splat(1.f) + exp(-x)); }
INLINE vf log_sigmoid(vf x) {
  vf down = x < zero() ? x : -x;  // -|x|
  return (x < zero() ? x : zero()) - log(splat(1.f) + exp(down));
}

}  // namespace

// logits [rows, experts + shared], row stride ld, bias [experts] -> expert, weight [rows, top_k + shared]
EXPORT int64_t route_rows(const float* logits, int64_t ld, const float* bias, int64_t rows, int64_t experts,
                          int64_t top_k, int64_t shared, int32_t* expert, float* weight) {
  const int64_t choices = top_k + shared;
  parallel(rows, double(rows * (experts + choices)) * 8.0, [=](int64_t begin, int64_t end) {
    row_scratch.resize(size_t(experts + choices + LANES));
    float *score = row_scratch.data(), *picked = score + experts;
    for (int64_t r = begin; r < end; r++) {
      const float* x = logits + r * ld;
      int32_t* chosen = expert + r * choices;
      float* w = weight + r * choices;
      for (int64_t e = 0; e < experts; e += W) {
        const int lanes = experts - e < W ? int(experts - e) : W;
        store(score + e, sigmoid(load(x + e, lanes)) + load(bias + e, lanes), lanes);
      }
      // top_k passes of argmax, kept in ascending order; an expert taken already is one of chosen[0 : n].
      for (int64_t n = 0; n < top_k; n++) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; e++) {
          if (!(best < 0 || score[e] > score[best])) continue;
          bool taken = false;
          for (int64_t m = 0; m < n; m++) taken |= chosen[m] == e;
          if (!taken) best = e;
        }
        int64_t at = n;
        for (; at > 0 && chosen[at - 1] > best; at--) chosen[at] = chosen[at - 1];
        chosen[at] = int32_t(best);
      }
      for (int64_t n = 0; n < shared; n++) chosen[top_k + n] = int32_t(experts + n);
      float top = -__builtin_inff();
      for (int64_t n = 0; n < choices; n += W) {
        const int lanes = choices - n < W ? int(choices - n) : W;
        vf v = zero();
        for (int i = 0; i < lanes; i++) v[i] = x[chosen[n + i]];
        v = log_sigmoid(v);
        store(picked + n, v, lanes);
        for (int i = 0; i < lanes; i++) top = v[i] > top ? v[i] : top;
      }
      float total = 0.f;
      for (int64_t n = 0; n < choices; n += W) {
        const int lanes = choices - n < W ? int(choices - n) : W;
        vf e = exp(load(picked + n, lanes) - splat(top));
        for (int i = 0; i < lanes; i++) w[n + i] = e[i], total += e[i];
      }
      for (int64_t n = 0; n < choices; n++) w[n] = w[n] / total;
    }
  });
  return 0;
}

// dlogits[chosen_j] = w_j (dw_j - sum_i dw_i w_i) sigmoid(-logit), 0 elsewhere
EXPORT int64_t route_backward(const float* logits, int64_t ld, const int32_t* expert, const float* weight,
                              const float* dweight, int64_t rows, int64_t width, int64_t choices, float* dlogits) {
  parallel(rows, double(rows * width) * 4.0, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const int32_t* chosen = expert + r * choices;
      const float *w = weight + r * choices, *dw = dweight + r * choices;
      float* d = dlogits + r * width;
      memset(d, 0, size_t(width) * 4);
      float mean = 0.f;
      for (int64_t n = 0; n < choices; n++) mean = fma1(dw[n], w[n], mean);
      for (int64_t n = 0; n < choices; n += W) {
        const int lanes = choices - n < W ? int(choices - n) : W;
        vf x = zero();
        for (int i = 0; i < lanes; i++) x[i] = logits[r * ld + chosen[n + i]];
        vf off = sigmoid(-x);
        for (int i = 0; i < lanes; i++) d[chosen[n + i]] = w[n + i] * (dw[n + i] - mean) * off[i];
      }
    }
  });
  return 0;
}
