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

/* One (request, key-value head, tile of query tokens): an online softmax (Milakov & Gimelshein 2018) over its pages. */
static inline __attribute__((always_inline)) void attend_tile(
    const float *q, int64_t q_stride, float *out, int64_t out_stride, const float *keys, const float *values,
    const int32_t *block_table, int64_t page_stride, int first_position, int tile, int window, float scale,
    const int G, const int D, const int B) {
    float acc[MAX_TILE * MAX_GROUP][MAX_DIM] __attribute__((aligned(64)));
    float top[MAX_TILE * MAX_GROUP], sum[MAX_TILE * MAX_GROUP];
    float weights[MAX_BLOCK] __attribute__((aligned(64)));
    for (int i = 0; i < tile * G; i++) {
        top[i] = -INFINITY;
        sum[i] = 0.0f;
        memset(acc[i], 0, sizeof(float) * D);
    }
    const int last_position = first_position + tile - 1;
    const int oldest = window > 0 && first_position - window + 1 > 0 ? first_position - window + 1 : 0;
    for (int block = oldest / B; block <= last_position / B; block++) {
        const float *k = keys + (int64_t)block_table[block] * page_stride;
        const float *v = values + (int64_t)block_table[block] * page_stride;
        for (int t = 0; t < tile; t++) {
            const int position = first_position + t;
            int stop = position + 1 - block * B;
            stop = stop > B ? B : stop;
            int start = window > 0 ? position - window + 1 - block * B : 0;
            start = start < 0 ? 0 : start;
            if (start >= stop) continue;
            for (int g = 0; g < G; g++) {
                const float *query = q + t * q_stride + g * D;
                float *a = acc[t * G + g];
                float best = top[t * G + g];
                for (int j = start; j < stop; j++) {
                    float dot = 0.0f;
                    for (int d = 0; d < D; d++) dot += query[d] * k[j * D + d];
                    weights[j] = dot * scale;
                }
                for (int j = start; j < stop; j++) best = weights[j] > best ? weights[j] : best;
                if (best > top[t * G + g]) {
                    const float shrink = top[t * G + g] == -INFINITY ? 0.0f : exp_neg(top[t * G + g] - best);
                    sum[t * G + g] *= shrink;
                    for (int d = 0; d < D; d++) a[d] *= shrink;
                    top[t * G + g] = best;
                }
                float total = 0.0f;
                for (int j = start; j < stop; j++) {
                    weights[j] = exp_neg(weights[j] - best);
                    total += weights[j];
                }
                sum[t * G + g] += total;
                for (int j = start; j < stop; j++) {
                    const float w = weights[j];
                    for (int d = 0; d < D; d++) a[d] += w * v[j * D + d];
                }
            }
        }
    }
    for (int t = 0; t < tile; t++)
        for (int g = 0; g < G; g++) {
            const float inverse = 1.0f / sum[t * G + g];
            for (int d = 0; d < D; d++) out[t * out_stride + g * D + d] = acc[t * G + g][d] * inverse;
        }
}

#define SPECIALIZED(G_, D_, B_)                                                                                     \
    if (G == G_ && D == D_ && B == B_) {                                                                            \
        attend_tile(qt, q_stride, ot, out_stride, k, v, table, page_stride, first, tile, window, scale, G_, D_, B_); \
        continue;                                                                                                   \
    }

/* out[T, H, D] = softmax(scale * q k^T) v over each request's pages, causal, optionally in a sliding window.
 * tiles[n, 3]: request, first query token in the flat batch, tokens (1..8). positions[T]: of every flat token. */
void paged_attention(const float *q, int64_t q_stride, float *out, int64_t out_stride, const float *key_cache,
                     const float *value_cache, const int32_t *block_tables, int64_t table_stride,
                     const int32_t *positions, const int32_t *tiles, int64_t n_tiles, int K, int G, int D, int B,
                     int window, float scale) {
    const int64_t page_stride = (int64_t)K * B * D;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t item = 0; item < n_tiles * K; item++) {
        const int32_t *t = tiles + (item / K) * 3;
        const int head = (int)(item % K);
        const int tile = t[2], first = positions[t[1]];
        const float *qt = q + t[1] * q_stride + (int64_t)head * G * D;
        float *ot = out + t[1] * out_stride + (int64_t)head * G * D;
        const float *k = key_cache + (int64_t)head * B * D, *v = value_cache + (int64_t)head * B * D;
        const int32_t *table = block_tables + t[0] * table_stride;
        SPECIALIZED(1, 64, 16)
        SPECIALIZED(2, 64, 16)
        SPECIALIZED(3, 64, 16)
        SPECIALIZED(4, 64, 16)
        SPECIALIZED(7, 64, 16)
        SPECIALIZED(8, 64, 16)
        SPECIALIZED(1, 128, 16)
        SPECIALIZED(2, 128, 16)
        SPECIALIZED(4, 128, 16)
        SPECIALIZED(8, 128, 16)
        attend_tile(qt, q_stride, ot, out_stride, k, v, table, page_stride, first, tile, window, scale, G, D, B);
    }
}

static inline void normalize_head(float *x, const float *weight, float eps, int D) {
    float squares = 0.0f;
    for (int d = 0; d < D; d++) squares += x[d] * x[d];
    const float r = 1.0f / sqrtf(squares / D + eps);
    for (int d = 0; d < D; d++) x[d] = x[d] * r * weight[d];
}

static inline void rotate_half(float *x, const float *cosine, const float *sine, int half) {
    for (int d = 0; d < half; d++) {
        const float a = x[d], b = x[d + half];
        x[d] = a * cosine[d] - b * sine[d];
        x[d + half] = b * cosine[d] + a * sine[d];
    }
}

/* qkv[T, (H + 2K) * D]: optional RMSNorm per head, rotary embedding of q and k (in place), k and v to their slots.
 * cos_sin[position, 2, half]; slots[T]: page * B + offset, or -1 for a token whose k and v are already there. */
void rope_cache_write(float *qkv, int64_t stride, float *key_cache, float *value_cache, const int32_t *positions,
                      const int64_t *slots, const float *cos_sin, const float *q_weight, const float *k_weight,
                      float eps, int64_t T, int H, int K, int D, int B, int half) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; t++) {
        float *row = qkv + t * stride;
        const float *cosine = cos_sin + (int64_t)positions[t] * 2 * half, *sine = cosine + half;
        for (int h = 0; h < H + K; h++) {
            float *x = row + h * D;
            if (q_weight) normalize_head(x, h < H ? q_weight : k_weight, eps, D);
            rotate_half(x, cosine, sine, half);
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

/* residual[T, N] += delta[T, N] (delta may be NULL); out = RMSNorm(residual) * weight. */
void add_rms_norm(float *residual, const float *delta, const float *weight, float *out, float eps, int64_t T,
                  int64_t N) {
#pragma omp parallel for schedule(static) if (T > 1)
    for (int64_t t = 0; t < T; t++) {
        float *x = residual + t * N, *y = out + t * N;
        float squares = 0.0f;
        if (delta) {
            const float *dx = delta + t * N;
            for (int64_t i = 0; i < N; i++) {
                x[i] += dx[i];
                squares += x[i] * x[i];
            }
        } else {
            for (int64_t i = 0; i < N; i++) squares += x[i] * x[i];
        }
        const float r = 1.0f / sqrtf(squares / (float)N + eps);
        for (int64_t i = 0; i < N; i++) y[i] = x[i] * r * weight[i];
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
