/* Part of a wheel's library: the best LEVEL of native.c in it that this processor, and its system, can run.
 *
 * The library links no OpenMP runtime but uses that of torch, which has the functions that GCC calls.
 */
#ifdef __clang__
#error "the library of a wheel is compiled by GCC"
#endif

const char *prefloss_level(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
    int avx512 = __builtin_cpu_supports("x86-64-v4");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return "avx512bf16";
    if (avx512) return "avx512";
    if (__builtin_cpu_supports("x86-64-v3")) return "avx2";
#endif
    return "baseline";
}
