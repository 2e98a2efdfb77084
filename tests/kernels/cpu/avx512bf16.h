/* The AVX-512 and bfloat16 instructions of native.c in plain C, so that its products run on any x86-64 processor, and
 * memory that runs out when a test says so. Included before native.c. */
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define __AVX512BF16__ 1

typedef union {
    __m512 ps;
    __m512i i;
    __m512bh bh;
    float f[16];
    uint32_t u[16];
    uint64_t q[8];
    uint16_t h[32];
} register_t_512;

#define EMULATED static inline __attribute__((always_inline))

EMULATED __m512 emulated_setzero_ps(void) { return (register_t_512){.u = {0}}.ps; }
EMULATED __m512i emulated_setzero_si512(void) { return (register_t_512){.u = {0}}.i; }
EMULATED __m512i emulated_set1_epi32(int32_t x) {
    register_t_512 to;
    for (int i = 0; i < 16; i++) to.u[i] = (uint32_t)x;
    return to.i;
}
EMULATED __m512i emulated_load(const void *from) {
    register_t_512 to;
    memcpy(&to, from, 64);
    return to.i;
}
EMULATED void emulated_store(void *to, __m512i x) { memcpy(to, &x, 64); }
EMULATED __m512 emulated_maskz_loadu_ps(__mmask16 mask, const float *from) {
    register_t_512 to;
    for (int i = 0; i < 16; i++) to.f[i] = mask >> i & 1 ? from[i] : 0.0f;
    return to.ps;
}
EMULATED void emulated_mask_storeu_ps(float *to, __mmask16 mask, __m512 x) {
    register_t_512 from = {.ps = x};
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) to[i] = from.f[i];
}
EMULATED float emulated_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}
EMULATED __m512 emulated_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    register_t_512 to = {.ps = sum}, x = {.bh = a}, y = {.bh = b};
    for (int i = 0; i < 32; i++) to.f[i / 2] += emulated_bf16(x.h[i]) * emulated_bf16(y.h[i]);
    return to.ps;
}
EMULATED __m512i emulated_unpack_epi32(__m512i a, __m512i b, int high) {
    register_t_512 x = {.i = a}, y = {.i = b}, to;
    for (int i = 0; i < 16; i++) to.u[i] = (i % 2 ? y : x).u[i / 4 * 4 + high * 2 + i % 4 / 2];
    return to.i;
}
EMULATED __m512i emulated_unpack_epi64(__m512i a, __m512i b, int high) {
    register_t_512 x = {.i = a}, y = {.i = b}, to;
    for (int i = 0; i < 8; i++) to.q[i] = (i % 2 ? y : x).q[i / 2 * 2 + high];
    return to.i;
}
EMULATED __m512i emulated_shuffle_i32x4(__m512i a, __m512i b, int lanes) {
    register_t_512 x = {.i = a}, y = {.i = b}, to;
    for (int i = 0; i < 16; i++) to.u[i] = (i < 8 ? x : y).u[(lanes >> i / 4 * 2 & 3) * 4 + i % 4];
    return to.i;
}

#define _mm512_setzero_ps emulated_setzero_ps
#define _mm512_setzero_si512 emulated_setzero_si512
#define _mm512_set1_epi32 emulated_set1_epi32
#define _mm512_load_si512 emulated_load
#define _mm512_loadu_si512 emulated_load
#define _mm512_storeu_si512 emulated_store
#define _mm512_maskz_loadu_ps emulated_maskz_loadu_ps
#define _mm512_mask_storeu_ps emulated_mask_storeu_ps
#define _mm512_dpbf16_ps emulated_dpbf16_ps
#define _mm512_unpacklo_epi32(a, b) emulated_unpack_epi32(a, b, 0)
#define _mm512_unpackhi_epi32(a, b) emulated_unpack_epi32(a, b, 1)
#define _mm512_unpacklo_epi64(a, b) emulated_unpack_epi64(a, b, 0)
#define _mm512_unpackhi_epi64(a, b) emulated_unpack_epi64(a, b, 1)
#define _mm512_shuffle_i32x4 emulated_shuffle_i32x4

/* Allocations until the first that fails; a negative number: none fails */
int allocations_left = -1;
static void *when_left(void *memory) {
    if (allocations_left-- != 0) return memory;
    free(memory);
    return NULL;
}
#define malloc(bytes) when_left(malloc(bytes))
#define aligned_alloc(alignment, bytes) when_left(aligned_alloc(alignment, bytes))
