/* The log-prob ops in C, for a CPU; build.py compiles this file, native.py calls and documents each function.
 *
 * A wheel's library holds it several times, once for each LEVEL of instructions, which the names of functions end in.
 * The OpenMP runtime is that of torch.
 *
 * Rows are read in blocks that stay in the first-level cache and become float32 there; no row is copied whole.
 * A row with a target < 0 is left out and not read. A target beyond the vocabulary, as in another shard of it, has
 * probability 0 and no gradient of its own. Products of bfloat16 are summed in float32.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#if defined(__AVX512BF16__) || defined(__F16C__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
int omp_get_thread_num(void);
#else
static inline int omp_get_thread_num(void) { return 0; }
#endif

/* without instructions for it, torch converts faster */
#if defined(__FLT16_MAX__) && (defined(__F16C__) || !defined(__x86_64__))
#define HAS_FLOAT16
#endif

#ifndef LEVEL
#define LEVEL native
#endif
#define JOINED(name, level) prefloss_##name##_##level
#define EXPANDED(name, level) JOINED(name, level)
#define EXPORT(name) EXPANDED(name, LEVEL)

enum { F32 = 0, BF16 = 1, F16 = 2, CODE = 3 };
#define BLOCK 1024
/* a kept logit is (code - 32767) / 2048 above the reference of its panel, which is no lower than any of them, with an
 * error of at most 2.4e-4; the lowest code means probability 0 */
#define CODE_STEPS 2048.0f
#define CODE_TOP 32767.0f
#define CODE_ZERO (-32768)
#define PANEL 64
/* bytes of fresh memory to request at a time: they stay in the second-level cache */
#define PIECE (1 << 19)

typedef struct {
    float factor;  /* without a cap: z = factor * x; with one: the slope at x = 0 */
    float cap_in;  /* z = cap_out * tanh(cap_in * x) */
    float cap_out; /* 0 without a cap */
} transform_t;

typedef struct {
    float grad; /* of the log-prob of the target */
    float a, b, c; /* dz_v = p_v (a + b log p_v + c p_v), besides the target's 1 */
} coefficients_t;

static inline float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

static inline uint16_t to_bf16(float x) {
    uint32_t bits = to_bits(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(x != x ? 0x7fc0 : rounded);
}

/* Cody-Waite reduction and the polynomial of Cephes: x = n log 2 + r, e^r = 1 + r + r^2 q(r) */
static inline float reduced(float x, float *n) {
    *n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    return (x - *n * 0.693359375f) + *n * 2.12194440e-4f;
}

static inline float expm1_of_reduced(float r) {
    float q = 1.9875691500e-4f;
    q = q * r + 1.3981999507e-3f;
    q = q * r + 8.3334519073e-3f;
    q = q * r + 4.1665795894e-2f;
    q = q * r + 1.6666665459e-1f;
    q = q * r + 5.0000001201e-1f;
    return q * (r * r) + r;
}

static inline float fast_exp(float x) {
    float n, clamped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float r = reduced(clamped, &n);
    float value = (expm1_of_reduced(r) + 1.0f) * from_bits((uint32_t)((int32_t)n + 127) << 23);
    return x < -87.0f ? 0.0f : value;
}

static inline float fast_tanh(float x) {
    float n, twice = 2.0f * fabsf(x), clamped = twice > 20.0f ? 20.0f : twice;
    float r = reduced(clamped, &n);
    float power = from_bits((uint32_t)((int32_t)n + 127) << 23);
    float minus1 = power * expm1_of_reduced(r) + (power - 1.0f);
    return copysignf(minus1 / (minus1 + 2.0f), x);
}

static inline float apply(float x, transform_t t) {
    if (t.cap_out == 0.0f) return x * t.factor;
    float z = t.cap_out * fast_tanh(x * t.cap_in);
    return x == -INFINITY ? -INFINITY : z;
}

static inline void load_block(const void *row, int kind, int64_t start, int m, float *restrict x) {
    if (kind == F32) {
        memcpy(x, (const float *)row + start, m * sizeof(float));
    } else if (kind == BF16) {
        const uint16_t *in = (const uint16_t *)row + start;
        for (int i = 0; i < m; i++) x[i] = from_bits((uint32_t)in[i] << 16);
#ifdef HAS_FLOAT16
    } else if (kind == F16) {
        const _Float16 *in = (const _Float16 *)row + start;
        int i = 0;
#ifdef __F16C__
        /* compilers convert one at a time */
        for (; i + 8 <= m; i += 8) _mm256_storeu_ps(x + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(in + i))));
#endif
        for (; i < m; i++) x[i] = (float)in[i];
#endif
    } else {
        const int16_t *in = (const int16_t *)row + start;
        for (int i = 0; i < m; i++)
            x[i] = in[i] == CODE_ZERO ? -INFINITY : ((float)in[i] - CODE_TOP) * (1.0f / CODE_STEPS);
    }
}

static inline void store_block(void *row, int kind, int64_t start, int m, const float *restrict x) {
    if (kind == F32) {
        memcpy((float *)row + start, x, m * sizeof(float));
    } else if (kind == BF16) {
        uint16_t *out = (uint16_t *)row + start;
        for (int i = 0; i < m; i++) out[i] = to_bf16(x[i]);
#ifdef HAS_FLOAT16
    } else if (kind == F16) {
        _Float16 *out = (_Float16 *)row + start;
        int i = 0;
#ifdef __F16C__
        for (; i + 8 <= m; i += 8)
            _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
        for (; i < m; i++) out[i] = (_Float16)x[i];
#endif
    } else {
        int16_t *out = (int16_t *)row + start;
        for (int i = 0; i < m; i++) {
            float code = nearbyintf(x[i] * CODE_STEPS + CODE_TOP);
            code = code > CODE_TOP ? CODE_TOP : code;
            out[i] = (int16_t)(code > CODE_ZERO ? code : CODE_ZERO);
        }
    }
}

static inline void transform_block(float *restrict x, int m, transform_t t) {
    if (t.cap_out != 0.0f) {
        for (int i = 0; i < m; i++) x[i] = apply(x[i], t);
    } else if (t.factor != 1.0f) {
        for (int i = 0; i < m; i++) x[i] *= t.factor;
    }
}

static const char *row_of(const void *base, int kind, int64_t row, int64_t stride) {
    return (const char *)base + row * stride * (kind == F32 ? 4 : 2);
}

int EXPORT(has_float16)(void) {
#ifdef HAS_FLOAT16
    return 1;
#else
    return 0;
#endif
}

/* Sums over the logits of a row so far, with e = exp(z - peak): of e, e (z - peak) and e * e; and the target's logit */
typedef struct {
    double peak, sum, weighted, squares, picked;
} sums_t;

static const sums_t NOTHING = {-INFINITY, 0, 0, 0, -INFINITY};

/* Rescale the sums to a new peak, which is no lower than the old one */
static inline void raise_peak(sums_t *s, double high) {
    /* the sums of a row of -inf only are 0, and -inf - -inf is NaN */
    if (high > s->peak && s->peak != -INFINITY) {
        double moved = s->peak - high, rescale = exp(moved);
        s->weighted = rescale * (s->weighted + moved * s->sum);
        s->sum *= rescale;
        s->squares *= rescale * rescale;
    }
    s->peak = high;
}

static inline __attribute__((always_inline)) void add_block(sums_t *s, const float *restrict x, const int m, int stats) {
    float high = (float)s->peak;
#pragma omp simd reduction(max : high)
    for (int i = 0; i < m; i++) high = x[i] > high ? x[i] : high;
    raise_peak(s, high);
    float shift = high == -INFINITY ? 0.0f : high, block = 0, weighted = 0, squares = 0;
    if (!stats) {
#pragma omp simd reduction(+ : block)
        for (int i = 0; i < m; i++) block += fast_exp(x[i] - shift);
    } else {
#pragma omp simd reduction(+ : block, weighted, squares)
        for (int i = 0; i < m; i++) {
            float d = x[i] - shift, e = fast_exp(d);
            block += e;
            weighted += e == 0.0f ? 0.0f : e * d;
            squares += e * e;
        }
    }
    s->sum += block;
    s->weighted += weighted;
    s->squares += squares;
}

/* Add columns first, first + 1, ... of the logits to the sums of their rows; all of these with `stats`, else three */
void EXPORT(fold)(const void *logits, int kind, int64_t rows, int64_t columns, int64_t stride, const int64_t *targets,
                   int64_t first, transform_t t, sums_t *sums, int stats, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t row = 0; row < rows; row++) {
        const char *in = row_of(logits, kind, row, stride);
        int64_t y = targets[row] - first;
        float x[BLOCK], picked;
        if (targets[row] < 0) continue;
        for (int64_t start = 0; start < columns; start += BLOCK) {
            int m = columns - start < BLOCK ? (int)(columns - start) : BLOCK;
            load_block(in, kind, start, m, x);
            transform_block(x, m, t);
            add_block(sums + row, x, m, stats);
        }
        if (y >= 0 && y < columns) {
            load_block(in, kind, y, 1, &picked);
            sums[row].picked = apply(picked, t);
        }
    }
}

/* Codes of logits; `above` has one number per row, the reference of all its panels */
void EXPORT(encode)(const float *logits, int64_t rows, int64_t columns, int64_t stride, transform_t t,
                     const float *above, int16_t *codes, int64_t codes_stride, float *references,
                     int64_t references_stride, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t row = 0; row < rows; row++) {
        float x[BLOCK];
        for (int64_t panel = 0; panel * PANEL < columns; panel++)
            references[row * references_stride + panel] = above[row];
        for (int64_t start = 0; start < columns; start += BLOCK) {
            int m = columns - start < BLOCK ? (int)(columns - start) : BLOCK;
            load_block(logits + row * stride, F32, start, m, x);
            transform_block(x, m, t);
            for (int i = 0; i < m; i++) x[i] -= above[row];
            store_block(codes + row * codes_stride, CODE, start, m, x);
        }
    }
}

/* Map whole pages of fresh memory in one system call. A page fault for each would take longer and interrupt the
 * prefetcher. Linux before 5.14 does not know the call, and nothing happens. */
static inline void populate(void *start, size_t bytes) {
#ifdef __linux__
    enum { PAGE = 4096, POPULATE_WRITE = 23 };
    uintptr_t first = ((uintptr_t)start + PAGE - 1) / PAGE * PAGE, last = ((uintptr_t)start + bytes) / PAGE * PAGE;
    if (last > first) madvise((void *)first, last - first, POPULATE_WRITE);
#endif
}

/* `out` may be `in`: an element of a row is written after it has been read, and before later ones are */
void EXPORT(differentiate)(const void *in, int in_kind, int64_t in_stride, void *out, int out_kind,
                            int64_t out_stride, int64_t rows, int64_t columns, const int64_t *targets,
                            int64_t first, transform_t t, const float *logps, const float *lses,
                            const coefficients_t *coefficients, int plain, const float *references,
                            int64_t references_stride, int fresh, int threads) {
    int64_t out_bytes = columns * (out_kind == F32 ? 4 : 2), group = fresh && out_bytes < PIECE ? PIECE / out_bytes : 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, group)
    for (int64_t row = 0; row < rows; row++) {
        const char *from = row_of(in, in_kind, row, in_stride);
        char *to = (char *)row_of(out, out_kind, row, out_stride);
        coefficients_t w = coefficients[row];
        float lse = lses[row], x[BLOCK], slopes[BLOCK];
        if (fresh && row % group == 0) populate(to, (rows - row < group ? rows - row : group) * out_bytes);
        if (targets[row] < 0) {
            memset(to, 0, out_bytes);
            continue;
        }
        for (int64_t start = 0; start < columns; start += BLOCK) {
            int m = columns - start < BLOCK ? (int)(columns - start) : BLOCK;
            int64_t y = targets[row] - first - start;
            load_block(from, in_kind, start, m, x);
            if (in_kind == CODE) {
                for (int panel = 0; panel < m; panel += PANEL) {
                    float above = references[row * references_stride + (start + panel) / PANEL] - lse;
                    int last = m - panel < PANEL ? m : panel + PANEL;
                    for (int i = panel; i < last; i++) x[i] += above;
                }
                if (t.cap_out != 0.0f)
                    for (int i = 0; i < m; i++) {
                        float bent = (x[i] + lse) / t.cap_out;
                        slopes[i] = x[i] == -INFINITY ? 0.0f : t.factor * (1.0f - bent * bent);
                    }
            } else {
                transform_block(x, m, t);
                if (t.cap_out != 0.0f)
                    for (int i = 0; i < m; i++) {
                        float bent = x[i] / t.cap_out;
                        slopes[i] = x[i] == -INFINITY ? 0.0f : t.factor * (1.0f - bent * bent);
                    }
                for (int i = 0; i < m; i++) x[i] -= lse;
            }
            if (plain) {
                for (int i = 0; i < m; i++) x[i] = w.a * fast_exp(x[i]);
            } else {
                for (int i = 0; i < m; i++) {
                    float p = fast_exp(x[i]), finite = p == 0.0f ? 0.0f : x[i];
                    x[i] = p * (w.a + w.b * finite + w.c * p);
                }
            }
            if (y >= 0 && y < m) {
                /* 1 - p from the log-prob: where p is near 1, exp(z - lse) lacks the digits */
                float logp = logps[row], p = expf(logp), finite = p == 0.0f ? 0.0f : logp;
                x[y] = -w.grad * expm1f(logp) + p * ((w.a + w.grad) + w.b * finite + w.c * p);
            }
            if (t.cap_out != 0.0f) {
                for (int i = 0; i < m; i++) x[i] *= slopes[i];
            } else if (t.factor != 1.0f) {
                for (int i = 0; i < m; i++) x[i] *= t.factor;
            }
            store_block(to, out_kind, start, m, x);
        }
    }
}

#ifdef __AVX512BF16__
#define MR 6
#define NR PANEL
#define KC 1024

typedef struct {
    const char *data;
    int64_t row, k; /* bytes from one row to the next, and from one pair of k to the next */
} pairs_t;

/* [m, NR] += pairs of a [m, 2 depth] times packed b [depth, NR, 2]; `fresh` starts at 0 */
static inline __attribute__((always_inline)) void tile(const int m, int64_t depth, pairs_t a,
                                                      const uint32_t *restrict b, float *out, int64_t stride,
                                                      int width, int fresh) {
    __m512 sums[MR][4];
    __mmask16 masks[4];
    for (int j = 0; j < 4; j++) {
        int left = width - 16 * j;
        masks[j] = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
    }
#pragma GCC unroll 6
    for (int r = 0; r < m; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            sums[r][j] = fresh ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(masks[j], out + r * stride + 16 * j);
    for (int64_t k = 0; k < depth; k++) {
        __m512bh columns[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) columns[j] = (__m512bh)_mm512_load_si512(b + k * NR + 16 * j);
#pragma GCC unroll 6
        for (int r = 0; r < m; r++) {
            int32_t pair;
            memcpy(&pair, a.data + r * a.row + k * a.k, 4);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], both, columns[j]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < m; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) _mm512_mask_storeu_ps(out + r * stride + 16 * j, masks[j], sums[r][j]);
}

static void tiles(int64_t m, int64_t depth, pairs_t a, const uint32_t *b, float *out, int64_t stride, int width,
                  int fresh) {
    for (int64_t r = 0; r < m; r += MR) {
        pairs_t at = {a.data + r * a.row, a.row, a.k};
        float *to = out + r * stride;
        switch (m - r) {
            case 1: tile(1, depth, at, b, to, stride, width, fresh); break;
            case 2: tile(2, depth, at, b, to, stride, width, fresh); break;
            case 3: tile(3, depth, at, b, to, stride, width, fresh); break;
            case 4: tile(4, depth, at, b, to, stride, width, fresh); break;
            case 5: tile(5, depth, at, b, to, stride, width, fresh); break;
            default: tile(6, depth, at, b, to, stride, width, fresh);
        }
    }
}

/* 16 x 16 transpose of 32-bit words, from rows `stride` words apart */
static inline void transpose16(const uint16_t *from, int64_t stride, int rows, uint32_t *to, int64_t to_stride) {
    __m512i r[16], s[16];
    for (int i = 0; i < 16; i++)
        r[i] = i < rows ? _mm512_loadu_si512(from + i * stride) : _mm512_setzero_si512();
    for (int i = 0; i < 8; i++) {
        s[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        s[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(s[4 * i], s[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(s[4 * i], s[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(s[4 * i + 1], s[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(s[4 * i + 1], s[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        s[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        s[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        s[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        s[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(s[i], s[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 8) * to_stride, _mm512_shuffle_i32x4(s[i], s[i + 8], 0xdd));
        _mm512_storeu_si512(to + (i + 4) * to_stride, _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0x88));
        _mm512_storeu_si512(to + (i + 12) * to_stride, _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0xdd));
    }
}

/* x[k * k_stride + n * n_stride] for k < ks and n < width, as pairs of k [depth, to_stride], padded with zeros */
static void pack(const uint16_t *x, int64_t k_stride, int64_t n_stride, int64_t ks, int width, int padded,
                 uint32_t *to, int64_t to_stride) {
    int64_t depth = (ks + 1) / 2, k = 0;
    if (k_stride == 1) {
        for (; 2 * k + 32 <= ks; k += 16)
            for (int n = 0; n < padded; n += 16)
                transpose16(x + 2 * k + n * n_stride, n_stride, width - n < 16 ? (width - n > 0 ? width - n : 0) : 16,
                            to + k * to_stride + n, to_stride);
    } else if (n_stride == 1) {
        for (; 2 * k + 2 <= ks; k++) {
            const uint16_t *low = x + 2 * k * k_stride, *high = low + k_stride;
            uint32_t *row = to + k * to_stride;
            for (int n = 0; n < width; n++) row[n] = low[n] | (uint32_t)high[n] << 16;
            for (int n = width; n < padded; n++) row[n] = 0;
        }
    }
    for (; k < depth; k++)
        for (int n = 0; n < padded; n++) {
            const uint16_t *at = x + 2 * k * k_stride + n * n_stride;
            uint32_t low = n < width ? at[0] : 0, high = n < width && 2 * k + 1 < ks ? at[k_stride] : 0;
            to[k * to_stride + n] = low | high << 16;
        }
}

/* Memory for so many threads, `bytes` for each, a multiple of 64. Allocated before the threads start: if there is not
 * enough, nothing has been written yet. */
static char *workspace(int64_t bytes, int threads) { return aligned_alloc(64, (size_t)bytes * threads); }

/* For few rows of `a`, contiguous in k: each thread packs panels of b and multiplies all rows by them. A small `out`
 * stays in the cache over all k, so that `a` is read once. */
static int multiply_few_rows(int64_t rows, int64_t columns, int64_t ks, const uint16_t *a, int64_t a_stride,
                             const uint16_t *b, int64_t bk, int64_t bn, float *out, int64_t stride, int add,
                             int threads) {
    int64_t panels = (columns + NR - 1) / NR, even = ks / 2 * 2, bytes = sizeof(uint32_t) * KC / 2 * NR;
    int small = rows * columns <= (1 << 20);
    char *memory = workspace(bytes, threads);
    if (!memory) return 1;
#pragma omp parallel num_threads(threads)
    {
        uint32_t *packed = (uint32_t *)(memory + omp_get_thread_num() * bytes);
        int64_t blocks = (even + KC - 1) / KC, outer = small ? blocks : 1, inner = small ? 1 : blocks;
        for (int64_t o = 0; o < outer; o++) {
#pragma omp for schedule(static) nowait
            for (int64_t panel = 0; panel < panels; panel++) {
                int width = columns - panel * NR < NR ? (int)(columns - panel * NR) : NR;
                for (int64_t i = 0; i < inner; i++) {
                    int64_t k = (small ? o : i) * KC, deep = even - k < KC ? even - k : KC;
                    pack(b + k * bk + panel * NR * bn, bk, bn, deep, width, NR, packed, NR);
                    pairs_t pairs = {(const char *)(a + k), a_stride * 2, 4};
                    tiles(rows, deep / 2, pairs, packed, out + panel * NR, stride, width, !add && k == 0);
                }
            }
        }
    }
    free(memory);
    return 0;
}

/* For many rows of `a`, contiguous in rows: b is packed once, each thread packs blocks of a and sums each tile over all
 * k, so that it is stored once, in float32 or rounded to bfloat16. */
static int multiply_many_rows(int64_t rows, int64_t columns, int64_t ks, const uint16_t *a, int64_t a_stride,
                              const uint16_t *b, int64_t bk, int64_t bn, void *out, int kind, int64_t stride, int add,
                              int threads) {
    enum { ROWS = 16 * MR };
    int64_t panels = (columns + NR - 1) / NR, blocks = (rows + ROWS - 1) / ROWS, depth = (ks + 1) / 2;
    int64_t whole = sizeof(uint32_t) * panels * depth * NR, bytes = sizeof(uint32_t) * depth * ROWS;
    uint32_t *packed = (uint32_t *)workspace(whole, 1);
    char *memory = workspace(bytes, threads);
    if (!packed || !memory) {
        free(packed);
        free(memory);
        return 1;
    }
#pragma omp parallel num_threads(threads)
    {
        uint32_t *mine = (uint32_t *)(memory + omp_get_thread_num() * bytes);
        float sums[ROWS * NR] __attribute__((aligned(64)));
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels; panel++) {
            int width = columns - panel * NR < NR ? (int)(columns - panel * NR) : NR;
            pack(b + panel * NR * bn, bk, bn, ks, width, NR, packed + panel * depth * NR, NR);
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t first = block * ROWS;
            int count = rows - first < ROWS ? (int)(rows - first) : ROWS;
            pack(a + first, a_stride, 1, ks, count, ROWS, mine, ROWS);
            for (int64_t panel = 0; panel < panels; panel++) {
                int width = columns - panel * NR < NR ? (int)(columns - panel * NR) : NR;
                int64_t at = first * stride + panel * NR;
                if (add)
                    for (int r = 0; r < count; r++)
                        load_block((float *)out + at + r * stride, F32, 0, width, sums + r * NR);
                for (int64_t k = 0; k < depth; k += KC / 2) {
                    pairs_t pairs = {(const char *)(mine + k * ROWS), 4, ROWS * 4};
                    tiles(count, depth - k < KC / 2 ? depth - k : KC / 2, pairs, packed + (panel * depth + k) * NR,
                          sums, NR, NR, !add && k == 0);
                }
                for (int r = 0; r < count; r++)
                    store_block((char *)out + (at + r * stride) * (kind == F32 ? 4 : 2), kind, 0, width, sums + r * NR);
            }
        }
    }
    free(packed);
    free(memory);
    return 0;
}

/* out[rows, columns] (+)= a[rows, ks] b[ks, columns]; strides in elements. Returns 0 on success. */
int EXPORT(multiply)(int64_t rows, int64_t columns, int64_t ks, const uint16_t *a, int64_t a_row, int64_t a_k,
                      const uint16_t *b, int64_t bk, int64_t bn, void *out, int kind, int64_t stride, int add,
                      int threads) {
    if (a_k == 1 && ks >= 2 && kind == F32) {
        float *sums = out;
        int failed = multiply_few_rows(rows, columns, ks, a, a_row, b, bk, bn, sums, stride, add, threads);
        if (failed || ks % 2 == 0) return failed;
        /* the last of an odd number of k has no other half of its pair */
        for (int64_t r = 0; r < rows; r++) {
            float last = from_bits((uint32_t)a[r * a_row + ks - 1] << 16);
            for (int64_t n = 0; n < columns; n++)
                sums[r * stride + n] += last * from_bits((uint32_t)b[(ks - 1) * bk + n * bn] << 16);
        }
        return 0;
    }
    if (a_row != 1 || (add && kind != F32)) return 2;
    return multiply_many_rows(rows, columns, ks, a, a_k, b, bk, bn, out, kind, stride, add, threads);
}

/* Add the logits of one panel, x[:width], to the sums of its row, and store them as codes if `codes` is not NULL */
static void fold_panel(float *restrict x, int width, const float *bias, transform_t t, sums_t *sums, int stats,
                       int16_t *codes, float *reference) {
    if (bias)
        for (int i = 0; i < width; i++) x[i] += bias[i];
    transform_block(x, width, t);
    for (int i = width; i < PANEL; i++) x[i] = -INFINITY;
    add_block(sums, x, PANEL, stats);
    if (!codes) return;
    float high = -INFINITY, y[PANEL];
#pragma omp simd reduction(max : high)
    for (int i = 0; i < PANEL; i++) high = x[i] > high ? x[i] : high;
    *reference = high == -INFINITY ? 0.0f : high;
    for (int i = 0; i < PANEL; i++) y[i] = x[i] - *reference;
    store_block(codes, CODE, 0, width, y);
}

/* Add the logits x w^T + bias of bfloat16 [rows, width] and [columns, width], which never leave the cache, to the sums
 * of their rows. Store codes and references of all but ignored rows, unless NULL. Panels are divided into a fixed number
 * of runs, whose sums are joined in order, so the result does not depend on the number of threads. 0 on success. */
int EXPORT(project)(int64_t rows, int64_t columns, int64_t width, const uint16_t *x, int64_t x_stride,
                     const uint16_t *w, int64_t w_stride, const float *bias, const int64_t *targets, int64_t first,
                     transform_t t, sums_t *sums, int stats, int16_t *codes, int64_t codes_stride, float *references,
                     int64_t references_stride, int threads) {
    enum { ROWS = 32 * MR, RUNS = 32 };
    if (width % 2) return 2;
    int64_t panels = (columns + PANEL - 1) / PANEL, length = (panels + RUNS - 1) / RUNS;
    int64_t runs = (panels + length - 1) / length, bytes = sizeof(uint32_t) * width / 2 * PANEL;
    sums_t *parts = malloc(sizeof(sums_t) * runs * rows);
    char *memory = workspace(bytes, threads);
    if (!parts || !memory) {
        free(parts);
        free(memory);
        return 1;
    }
#pragma omp parallel num_threads(threads)
    {
        uint32_t *packed = (uint32_t *)(memory + omp_get_thread_num() * bytes);
        float tile[ROWS * PANEL] __attribute__((aligned(64)));
#pragma omp for schedule(dynamic, 1)
        for (int64_t run = 0; run < runs; run++) {
            sums_t *mine = parts + run * rows;
            for (int64_t row = 0; row < rows; row++) mine[row] = NOTHING;
            for (int64_t panel = run * length; panel < panels && panel < (run + 1) * length; panel++) {
                int64_t at = panel * PANEL;
                int count = columns - at < PANEL ? (int)(columns - at) : PANEL;
                pack(w + at * w_stride, 1, w_stride, width, count, PANEL, packed, PANEL);
                for (int64_t start = 0; start < rows; start += ROWS) {
                    int height = rows - start < ROWS ? (int)(rows - start) : ROWS;
                    for (int64_t k = 0; k < width; k += KC) {
                        pairs_t pairs = {(const char *)(x + start * x_stride + k), x_stride * 2, 4};
                        tiles(height, (width - k < KC ? width - k : KC) / 2, pairs, packed + k / 2 * PANEL, tile,
                              PANEL, PANEL, k == 0);
                    }
                    for (int64_t row = start; row < start + height; row++) {
                        int64_t y = targets[row] - first - at;
                        float *z = tile + (row - start) * PANEL;
                        if (targets[row] < 0) continue;
                        fold_panel(z, count, bias ? bias + at : NULL, t, mine + row, stats,
                                   codes ? codes + row * codes_stride + at : NULL,
                                   codes ? references + row * references_stride + panel : NULL);
                        if (y >= 0 && y < count) mine[row].picked = z[y];
                    }
                }
            }
        }
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t run = 0; run < runs; run++) {
            sums_t part = parts[run * rows + row], *all = sums + row;
            double high = part.peak > all->peak ? part.peak : all->peak;
            raise_peak(all, high);
            raise_peak(&part, high);
            all->sum += part.sum;
            all->weighted += part.weighted;
            all->squares += part.squares;
            all->picked = part.picked > all->picked ? part.picked : all->picked;
        }
    free(parts);
    free(memory);
    return 0;
}
#else
int EXPORT(multiply)(int64_t rows, int64_t columns, int64_t ks, const uint16_t *a, int64_t a_row, int64_t a_k,
                      const uint16_t *b, int64_t bk, int64_t bn, void *out, int kind, int64_t stride, int add,
                      int threads) {
    return 2;
}

int EXPORT(project)(int64_t rows, int64_t columns, int64_t width, const uint16_t *x, int64_t x_stride,
                     const uint16_t *w, int64_t w_stride, const float *bias, const int64_t *targets, int64_t first,
                     transform_t t, sums_t *sums, int stats, int16_t *codes, int64_t codes_stride, float *references,
                     int64_t references_stride, int threads) {
    return 2;
}
#endif

int EXPORT(multiplies)(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}
