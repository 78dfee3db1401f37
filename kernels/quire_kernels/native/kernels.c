/* Quire's CPU kernels, fp32. Built on first use by build.py with the machine's own C compiler.
 *
 * Shapes: T tokens, R requests, H query heads, K key-value heads, G = H / K, D head dim, B block size, P pages.
 * A page of the key (and of the value) cache is [K, B, D]: one head's tokens are consecutive.
 * Threads: OpenMP, resolved at load time to the runtime torch already brought, so both share one pool of threads.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define MAX_TILE 8       /* query tokens that read a page together while it is in the cache */
#define MAX_BLOCK 64
#define PASS 64          /* keys whose scores are computed before their values are added */
#define MAX_GROUP 16
#define MAX_DIM 256

/* e^x for x <= 0 by a degree-5 polynomial of 2^f (Cephes' expf); relative error under 2e-7, and it vectorizes. */
static inline float exp_neg(float x) {
    x = x < -87.0f ? -87.0f : x;
    float t = x * 1.44269504088896341f;
    float n = floorf(t + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } two_n = { ((int32_t)n + 127) << 23 };
    return p * two_n.f;
}

/* Vectors of W floats. `column_sums` turns W vectors into one whose lane j is the sum of vector j, in 3 (W - 1) operations:
 * pairs are merged lane by lane, then groups of two lanes, of four, of eight. */
#ifdef __AVX512F__
#define W 16
#define ROWS 4           /* that share loads of values: their accumulators fill the registers */
#define MERGE(a, b, KEEP, MOVE) (__builtin_shuffle(a, b, (ivec)KEEP) + __builtin_shuffle(a, b, (ivec)MOVE))
#define EVEN {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}
#define ODD {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31}
#define EVEN2 {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}
#define ODD2 {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31}
#define EVEN4 {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27}
#define ODD4 {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31}
#define EVEN8 {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}
#define ODD8 {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31}
#else
#define W 8
#define ROWS 2
#define MERGE(a, b, KEEP, MOVE) (__builtin_shuffle(a, b, (ivec)KEEP) + __builtin_shuffle(a, b, (ivec)MOVE))
#define EVEN {0, 8, 2, 10, 4, 12, 6, 14}
#define ODD {1, 9, 3, 11, 5, 13, 7, 15}
#define EVEN2 {0, 1, 8, 9, 4, 5, 12, 13}
#define ODD2 {2, 3, 10, 11, 6, 7, 14, 15}
#define EVEN4 {0, 1, 2, 3, 8, 9, 10, 11}
#define ODD4 {4, 5, 6, 7, 12, 13, 14, 15}
#endif
typedef float vec __attribute__((vector_size(4 * W)));
typedef float loose_vec __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));

static inline __attribute__((always_inline)) vec column_sums(vec *v) {
    for (int i = 0; i < W / 2; i++) v[i] = MERGE(v[2 * i], v[2 * i + 1], EVEN, ODD);
    for (int i = 0; i < W / 4; i++) v[i] = MERGE(v[2 * i], v[2 * i + 1], EVEN2, ODD2);
    for (int i = 0; i < W / 8; i++) v[i] = MERGE(v[2 * i], v[2 * i + 1], EVEN4, ODD4);
#if W == 16
    v[0] = MERGE(v[0], v[1], EVEN8, ODD8);
#endif
    return v[0];
}

/* scores[j] = scale * q . k[j], all B rows of a page; what lies past the context is masked by the caller. */
static inline __attribute__((always_inline)) void score_page(
    const float *q, const float *k, float *scores, float scale, const int D, const int B) {
    if (D % W == 0 && B % W == 0) {
        for (int j = 0; j < B; j += W) {
            vec partial[W];
            for (int i = 0; i < W; i++) {
                const float *row = k + (j + i) * D;
                vec sum = *(const loose_vec *)q * *(const loose_vec *)row;
                for (int d = W; d < D; d += W) sum += *(const loose_vec *)(q + d) * *(const loose_vec *)(row + d);
                partial[i] = sum;
            }
            *(loose_vec *)(scores + j) = column_sums(partial) * scale;
        }
        return;
    }
    for (int j = 0; j < B; j++) {
        float dot = 0.0f;
        for (int d = 0; d < D; d++) dot += q[d] * k[j * D + d];
        scores[j] = dot * scale;
    }
}

/* Of `rows` rows: acc = acc * shrink + the sum over keys j of weights[j] v[j]. Keys count from the first page in `pages`;
 * each value is loaded once for all rows, and the accumulators stay in registers, `vecs` vectors at a time. Every row sums
 * in the order of the keys, whichever rows come with it. */
static inline __attribute__((always_inline)) void add_values(
    float (*acc)[MAX_DIM], const float (*weights)[PASS], const float *shrink, const float *values, const int32_t *pages,
    int64_t page_stride, int first, int stop, const int rows, const int vecs, const int D, const int B) {
    for (int d = 0; d < D; d += vecs * W) {
        vec a[ROWS][4];
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < vecs; i++) a[r][i] = *(loose_vec *)(acc[r] + d + i * W) * shrink[r];
        for (int page = first / B; page * B < stop; page++) {
            const float *v = values + pages[page] * page_stride + d;
            const int from = page * B < first ? first - page * B : 0, to = stop - page * B < B ? stop - page * B : B;
            for (int j = from; j < to; j++) {
                vec value[4];
                for (int i = 0; i < vecs; i++) value[i] = *(const loose_vec *)(v + j * D + i * W);
                for (int r = 0; r < rows; r++)
                    for (int i = 0; i < vecs; i++) a[r][i] += weights[r][page * B + j] * value[i];
            }
        }
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < vecs; i++) *(loose_vec *)(acc[r] + d + i * W) = a[r][i];
    }
}

/* The same where a head is not whole vectors: one row. */
static inline __attribute__((always_inline)) void add_loose_values(
    float *acc, const float *weights, float shrink, const float *values, const int32_t *pages, int64_t page_stride,
    int first, int stop, const int D, const int B) {
    for (int d = 0; d < D; d++) acc[d] *= shrink;
    for (int j = first; j < stop; j++) {
        const float *v = values + pages[j / B] * page_stride + j % B * D;
        for (int d = 0; d < D; d++) acc[d] += weights[j] * v[d];
    }
}

/* weights[j] = e^(weights[j] - their maximum and `top`), n of them, whole vectors; returns the new maximum. Their sum is
 * added to `sums`, lane by lane, after what is there was multiplied by `shrink`: e^(top - the new one). */
static inline __attribute__((always_inline)) float soften(
    float *weights, int n, float top, float *sums, float *shrink) {
    float lanes[W] __attribute__((aligned(64)));
    for (int l = 0; l < W; l++) lanes[l] = top;
    for (int j = 0; j < n; j += W)
        for (int l = 0; l < W; l++) lanes[l] = weights[j + l] > lanes[l] ? weights[j + l] : lanes[l];
    for (int half = W / 2; half; half /= 2)
        for (int l = 0; l < half; l++) lanes[l] = lanes[l + half] > lanes[l] ? lanes[l + half] : lanes[l];
    const float best = lanes[0];
    *shrink = top == -INFINITY ? 0.0f : exp_neg(top - best);
    for (int l = 0; l < W; l++) lanes[l] = sums[l] * *shrink;
    for (int j = 0; j < n; j += W)
        for (int l = 0; l < W; l++) {
            weights[j + l] = exp_neg(weights[j + l] - best);
            lanes[l] += weights[j + l];
        }
    for (int l = 0; l < W; l++) sums[l] = lanes[l];
    return best;
}

/* One (request, key-value head, tile of query tokens): an online softmax (Milakov & Gimelshein 2018) over passes of PASS
 * keys. A row is a query token's head; a few of them go over a pass together. Passes begin at fixed places, so that a
 * row's bits do not depend on its tile. */
static inline __attribute__((always_inline)) void attend_tile(
    const float *q, int64_t q_stride, float *out, int64_t out_stride, const float *keys, const float *values,
    const int32_t *block_table, int64_t page_stride, int first_position, int tile, int window, float scale,
    float cap, const float *sinks, const float *slopes, const int32_t *spans, int G, const int D, const int B) {
    float acc[MAX_TILE * MAX_GROUP][MAX_DIM] __attribute__((aligned(64)));
    float sums[MAX_TILE * MAX_GROUP][W] __attribute__((aligned(64)));
    float weights[ROWS][PASS] __attribute__((aligned(64)));
    float top[MAX_TILE * MAX_GROUP], shrink[ROWS];
    int starts[MAX_TILE], stops[MAX_TILE], oldest = first_position, latest = first_position;
    const int pages = PASS / B;
    for (int t = 0; t < tile; t++) {
        starts[t] = window > 0 && first_position + t - window + 1 > 0 ? first_position + t - window + 1 : 0;
        stops[t] = first_position + t + 1;
        if (spans) { /* it holds the token itself: what it sees is in one piece */
            if (spans[2 * t] < starts[t]) starts[t] = spans[2 * t];
            if (spans[2 * t + 1] > stops[t]) stops[t] = spans[2 * t + 1];
        }
        if (starts[t] < oldest) oldest = starts[t];
        if (stops[t] - 1 > latest) latest = stops[t] - 1;
    }
    for (int i = 0; i < tile * G; i++) {
        top[i] = -INFINITY;
        memset(sums[i], 0, sizeof(sums[i]));
        memset(acc[i], 0, sizeof(float) * D);
    }
    for (int block = oldest / B / pages * pages; block <= latest / B; block += pages) {
        const int32_t *table = block_table + block;
        const int begin = block * B;
        const int first = oldest > begin ? oldest - begin : 0;
        const int stop = latest + 1 - begin < pages * B ? latest + 1 - begin : pages * B;
        const int n = (stop + B - 1) / B * B, padded = (n + W - 1) / W * W;
        for (int base = 0; base < tile * G; base += ROWS) {
            const int rows = tile * G - base < ROWS ? tile * G - base : ROWS;
            for (int r = 0; r < rows; r++) {
                const int t = (base + r) / G, g = (base + r) % G;
                float *w = weights[r];
                int from = starts[t] - begin, to = stops[t] - begin;
                from = from < 0 ? 0 : from;
                to = to > n ? n : to;
                if (from >= to) { /* it sees nothing here */
                    memset(w, 0, sizeof(float) * padded);
                    shrink[r] = 1.0f;
                    continue;
                }
                for (int page = first / B; page * B < n; page++) {
                    const float *k = keys + table[page] * page_stride;
                    if (base + r == 0 && (block + pages + page) * B <= latest) { /* it lies anywhere: fetch it now */
                        const int64_t next = table[pages + page] * page_stride;
                        for (int i = 0; i < B * D; i += 16) {
                            __builtin_prefetch(keys + next + i, 0, 2);
                            __builtin_prefetch(values + next + i, 0, 2);
                        }
                    }
                    score_page(q + t * q_stride + g * D, k, w + page * B, scale, D, B);
                }
                if (cap > 0.0f)
                    for (int j = from; j < to; j++) w[j] = cap * tanhf(w[j] / cap);
                if (slopes)
                    for (int j = from; j < to; j++) w[j] -= slopes[g] * (float)(first_position + t - begin - j);
                if (from > 0 || to < padded)
                    for (int j = 0; j < padded; j++) w[j] = j < from || j >= to ? -INFINITY : w[j];
                top[base + r] = soften(w, padded, top[base + r], sums[base + r], &shrink[r]);
            }
#define ADD(VECS, N)                                                                                                \
    add_values(acc + base, weights, shrink, values, table, page_stride, first, stop, N, VECS, D, B)
#define ADD_ROWS(VECS)                                                                                              \
    if (rows == 1) ADD(VECS, 1);                                                                                    \
    else if (rows == 2) ADD(VECS, 2);                                                                               \
    else if (rows == 3) ADD(VECS, 3);                                                                               \
    else ADD(VECS, 4);
            if (D % (4 * W) == 0) {
                ADD_ROWS(4)
            } else if (D % (2 * W) == 0) {
                ADD_ROWS(2)
            } else if (D % W == 0) {
                ADD_ROWS(1)
            } else {
                for (int r = 0; r < rows; r++)
                    add_loose_values(acc[base + r], weights[r], shrink[r], values, table, page_stride, first, stop, D, B);
            }
        }
    }
    for (int i = 0; i < tile * G; i++) {
        const int t = i / G, g = i % G;
        float sum = 0.0f;
        for (int l = 0; l < W; l++) sum += sums[i][l];
        float inverse = 1.0f / sum;
        if (sinks) { /* a logit that takes part and carries no value */
            const float best = sinks[g] > top[i] ? sinks[g] : top[i];
            const float less = exp_neg(top[i] - best);
            inverse = less / (sum * less + exp_neg(sinks[g] - best));
        }
        for (int d = 0; d < D; d++) out[t * out_stride + g * D + d] = acc[i][d] * inverse;
    }
}

#define SPECIALIZED(D_, B_)                                                                                         \
    if (D == D_ && B == B_) {                                                                                       \
        attend_tile(qt, q_stride, ot, out_stride, k, v, table, page_stride, first, tile, window, scale, cap, s, a,  \
                    e, G, D_, B_);                                                                                  \
        continue;                                                                                                   \
    }

/* out[T, H, D] = softmax(scale * q k^T) v over each request's pages, causal, optionally in a sliding window, with scores
 * soft-capped (cap > 0), with ALiBi's slopes [H], with sinks [H], and with spans [T, 2] that a token sees besides. Groups
 * of over MAX_GROUP heads are taken in parts.
 * tiles[n, 4]: request, first query token in the flat batch, tokens (1..8), the first one's position. */
void paged_attention(const float *q, int64_t q_stride, float *out, int64_t out_stride, const float *key_cache,
                     const float *value_cache, const int32_t *block_tables, int64_t table_stride,
                     const int32_t *tiles, int64_t n_tiles, int K, int G, int D, int B, int window, float scale,
                     float cap, const float *sinks, const float *slopes, const int32_t *spans) {
    const int64_t page_stride = (int64_t)K * B * D;
    const int whole = G, parts = (whole + MAX_GROUP - 1) / MAX_GROUP;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t item = 0; item < n_tiles * K * parts; item++) {
        const int32_t *t = tiles + (item / parts / K) * 4;
        const int head = (int)(item / parts % K), begin = (int)(item % parts) * MAX_GROUP;
        const int G = whole - begin < MAX_GROUP ? whole - begin : MAX_GROUP;
        const int tile = t[2], first = t[3];
        const int64_t query = (int64_t)head * whole + begin;
        const float *qt = q + t[1] * q_stride + query * D;
        const float *s = sinks ? sinks + query : 0, *a = slopes ? slopes + query : 0;
        const int32_t *e = spans ? spans + 2 * t[1] : 0;
        float *ot = out + t[1] * out_stride + query * D;
        const float *k = key_cache + (int64_t)head * B * D, *v = value_cache + (int64_t)head * B * D;
        const int32_t *table = block_tables + t[0] * table_stride;
        SPECIALIZED(64, 16)
        SPECIALIZED(128, 16)
        attend_tile(qt, q_stride, ot, out_stride, k, v, table, page_stride, first, tile, window, scale, cap, s, a, e, G, D,
                    B);
    }
}

static inline void normalize_head(float *x, const float *weight, float eps, float offset, int D) {
    float squares = 0.0f;
    for (int d = 0; d < D; d++) squares += x[d] * x[d];
    const float r = 1.0f / sqrtf(squares / D + eps);
    for (int d = 0; d < D; d++) x[d] = x[d] * r * (offset + weight[d]);
}

static inline void rotate_pairs(float *x, const float *cosine, const float *sine, int half) {
    for (int d = 0; d < half; d++) {
        const float a = x[2 * d], b = x[2 * d + 1];
        x[2 * d] = a * cosine[d] - b * sine[d];
        x[2 * d + 1] = b * cosine[d] + a * sine[d];
    }
}

static inline void rotate_half(float *x, const float *cosine, const float *sine, int half) {
    for (int d = 0; d < half; d++) {
        const float a = x[d], b = x[d + half];
        x[d] = a * cosine[d] - b * sine[d];
        x[d + half] = b * cosine[d] + a * sine[d];
    }
}

/* qkv[T, (H + 2K) * D]: optional RMSNorm per head (before the rotary embedding or after it; the factor is offset +
 * weight), rotary embedding of q and k (in place; none where half is 0), k and v to their slots. cos_sin[position, 2, half]; slots[T]: page * B + offset, or -1 for a token whose k and v are already there. */
void rope_cache_write(float *qkv, int64_t stride, float *key_cache, float *value_cache, const int32_t *positions,
                      const int64_t *slots, const float *cos_sin, const float *q_weight, const float *k_weight,
                      float eps, float offset, int norm_last, int64_t T, int H, int K, int D, int B, int half,
                      int interleaved) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; t++) {
        float *row = qkv + t * stride;
        const float *cosine = half ? cos_sin + (int64_t)positions[t] * 2 * half : 0, *sine = cosine + half;
        for (int h = 0; h < H + K; h++) {
            float *x = row + h * D;
            if (q_weight && !norm_last) normalize_head(x, h < H ? q_weight : k_weight, eps, offset, D);
            if (interleaved)
                rotate_pairs(x, cosine, sine, half);
            else
                rotate_half(x, cosine, sine, half);
            if (q_weight && norm_last) normalize_head(x, h < H ? q_weight : k_weight, eps, offset, D);
        }
        if (slots[t] < 0) continue;
        const int64_t page = slots[t] / B, offset = slots[t] % B;
        for (int h = 0; h < K; h++) {
            const int64_t at = ((page * K + h) * B + offset) * D;
            memcpy(key_cache + at, row + (H + h) * D, sizeof(float) * D);
            memcpy(value_cache + at, row + (H + K + h) * D, sizeof(float) * D);
        }
    }
}

/* residual[T, N] += delta[T, N] (delta may be NULL); out = RMSNorm(residual) * (offset + weight). Rows may be strided,
 * those of out are not. */
void add_rms_norm(float *residual, const float *delta, const float *weight, float *out, float eps, float offset,
                  int64_t T, int64_t N, int64_t stride, int64_t delta_stride) {
#pragma omp parallel for schedule(static) if (T > 1)
    for (int64_t t = 0; t < T; t++) {
        float *x = residual + t * stride, *y = out + t * N;
        float squares = 0.0f;
        if (delta) {
            const float *dx = delta + t * delta_stride;
            for (int64_t i = 0; i < N; i++) {
                x[i] += dx[i];
                squares += x[i] * x[i];
            }
        } else {
            for (int64_t i = 0; i < N; i++) squares += x[i] * x[i];
        }
        const float r = 1.0f / sqrtf(squares / (float)N + eps);
        for (int64_t i = 0; i < N; i++) y[i] = x[i] * r * (offset + weight[i]);
    }
}

/* out[T, N] = silu(x[:, :N]) * x[:, N:] */
void silu_mul(const float *x, float *out, int64_t T, int64_t N) {
#pragma omp parallel for schedule(static) if (T > 1)
    for (int64_t t = 0; t < T; t++) {
        const float *gate = x + t * 2 * N, *up = gate + N;
        float *y = out + t * N;
        for (int64_t i = 0; i < N; i++) {
            const float g = gate[i], e = exp_neg(-fabsf(g)); /* sigmoid without overflow */
            y[i] = g * up[i] * (g >= 0.0f ? 1.0f : e) / (1.0f + e);
        }
    }
}

/* logits[places[m]][i] = -infinity where bit i % 32 of masks[m][i / 32] is 0. Every word is done alike: the inner loop is
 * a comparison and a blend. */
void mask_logits(float *logits, int64_t stride, const int64_t *places, const int32_t *masks, int64_t mask_stride,
                 int64_t M, int64_t V) {
#pragma omp parallel for schedule(static) if (M > 1)
    for (int64_t m = 0; m < M; m++) {
        float *row = logits + places[m] * stride;
        const uint32_t *words = (const uint32_t *)masks + m * mask_stride;
        for (int64_t first = 0; first < V; first += 32) {
            const uint32_t bits = words[first / 32];
            float *x = row + first;
            if (V - first >= 32)
                for (int i = 0; i < 32; i++) x[i] = bits >> i & 1 ? x[i] : -INFINITY;
            else
                for (int i = 0; i < V - first; i++) x[i] = bits >> i & 1 ? x[i] : -INFINITY;
        }
    }
}

/* ---- recurrent layers: see the contract of quire_kernels.recurrence ------------------------------------------------ */

#define MAX_TAPS 8
#define CHANNELS 64

/* One request's block of channels: the inputs before its first token are those of its state, kept aside, since the new
 * state may lie where the old one did. */
void short_convolution(const float *x, int64_t stride, const float *weight, const float *bias, float *out, float *states,
                       const int32_t *reads, const int32_t *writes, const int32_t *starts, int64_t R, int64_t C, int K,
                       int silu) {
    const int64_t blocks = (C + CHANNELS - 1) / CHANNELS;
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t r = 0; r < R; r++)
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t first = b * CHANNELS, width = C - first < CHANNELS ? C - first : CHANNELS;
            const int count = starts[r + 1] - starts[r];
            float old[MAX_TAPS][CHANNELS] = {{0}};
            if (reads[r] >= 0)
                for (int i = 0; i < K - 1; i++)
                    memcpy(old[i], states + ((int64_t)reads[r] * (K - 1) + i) * C + first, width * sizeof(float));
            const float *rows = x + (int64_t)starts[r] * stride + first;
            for (int t = 0; t < count; t++) {
                float sum[CHANNELS] = {0};
                if (bias) memcpy(sum, bias + first, width * sizeof(float));
                for (int i = 0; i < K; i++) { /* the input of i taps from the oldest */
                    const int at = t - (K - 1) + i;
                    const float *input = at >= 0 ? rows + at * stride : old[at + K - 1], *w = weight + i * C + first;
                    for (int64_t c = 0; c < width; c++) sum[c] += w[c] * input[c];
                }
                float *y = out + ((int64_t)starts[r] + t) * C + first;
                for (int64_t c = 0; c < width; c++) {
                    const float e = exp_neg(-fabsf(sum[c]));
                    y[c] = silu ? sum[c] * (sum[c] >= 0.0f ? 1.0f : e) / (1.0f + e) : sum[c];
                }
            }
            for (int i = 0; i < K - 1; i++) {
                const int at = count - (K - 1) + i;
                memcpy(states + ((int64_t)writes[r] * (K - 1) + i) * C + first, at >= 0 ? rows + at * stride : old[at + K - 1],
                       width * sizeof(float));
            }
        }
}

/* x / sqrt(sum of squares + eps), times scale */
static inline void unit_length(const float *x, float *out, int D, float scale, float eps) {
    float squares = eps;
    for (int d = 0; d < D; d++) squares += x[d] * x[d];
    const float r = scale / sqrtf(squares);
    for (int d = 0; d < D; d++) out[d] = x[d] * r;
}

/* q, k: [T, G, D], v: [T, H, P], each token's heads consecutive, tokens a stride apart; states [S, H, D, P]. */
void recurrence(const float *q, int64_t q_stride, const float *k, int64_t k_stride, const float *v, int64_t v_stride,
                const float *dt, int64_t dt_stride, const float *beta, int64_t beta_stride, const float *decay,
                const float *dt_bias, const float *skip, float low, float high, float *out, float *states,
                const int32_t *reads, const int32_t *writes, const int32_t *starts, int64_t R, int H, int G, int D, int P,
                float eps) {
    const int64_t size = (int64_t)D * P;
#pragma omp parallel for schedule(dynamic, 1) collapse(2)
    for (int64_t r = 0; r < R; r++)
        for (int h = 0; h < H; h++) {
            float *state = states + ((int64_t)writes[r] * H + h) * size;
            if (reads[r] < 0)
                memset(state, 0, size * sizeof(float));
            else if (reads[r] != writes[r])
                memcpy(state, states + ((int64_t)reads[r] * H + h) * size, size * sizeof(float));
            const int g = h / (H / G);
            float unit_query[MAX_DIM], unit_key[MAX_DIM], added[MAX_DIM], read[MAX_DIM];
            for (int64_t t = starts[r]; t < starts[r + 1]; t++) {
                const float *query = q + t * q_stride + (int64_t)g * D, *key = k + t * k_stride + (int64_t)g * D;
                const float *value = v + t * v_stride + (int64_t)h * P;
                const float raw = dt[t * dt_stride + h] + dt_bias[h];
                float step = raw > 20.0f ? raw : log1pf(expf(raw));
                step = step < low ? low : step > high ? high : step;
                const float fade = expf(decay[h] * step);
                if (beta) {
                    unit_length(query, unit_query, D, 1.0f / sqrtf((float)D), eps);
                    unit_length(key, unit_key, D, 1.0f, eps);
                    query = unit_query, key = unit_key;
                    memset(added, 0, P * sizeof(float));
                    for (int d = 0; d < D; d++) {
                        float *restrict row = state + (int64_t)d * P;
                        for (int p = 0; p < P; p++) {
                            row[p] *= fade;
                            added[p] += row[p] * key[d];
                        }
                    }
                    const float rate = 1.0f / (1.0f + expf(-beta[t * beta_stride + h]));
                    for (int p = 0; p < P; p++) added[p] = (value[p] - added[p]) * rate;
                } else
                    for (int p = 0; p < P; p++) added[p] = value[p] * step;
                const float left = beta ? 1.0f : fade; /* what has not faded yet */
                for (int p = 0; p < P; p++) read[p] = skip ? skip[h] * value[p] : 0.0f;
                for (int d = 0; d < D; d++) {
                    float *restrict row = state + (int64_t)d * P;
                    for (int p = 0; p < P; p++) {
                        row[p] = row[p] * left + key[d] * added[p];
                        read[p] += row[p] * query[d];
                    }
                }
                memcpy(out + (t * H + h) * P, read, P * sizeof(float));
            }
        }
}
