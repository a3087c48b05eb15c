/* Vectors of 16 floats, by GCC's vector extensions: the compiler makes of them what the processor
 * has. Every operation is done lane by lane, so that it gives the same bits wherever it is used. */

#ifndef CPU_VECTORS_H
#define CPU_VECTORS_H

#include <math.h>
#include <stdint.h>

#define LANES 16
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4)));

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define PADDED(n) (((n) + LANES - 1) / LANES * LANES)

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec splat(float x) { return (vec){} + x; }

/* Of two vectors the lanes whose number has the bit 8 (4, 2, 1) not set, then those that have it:
 * b's between a's. Compilers want constants here, and at once. */
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#define LOWER8(a, b) SHUFFLED(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define UPPER8(a, b) SHUFFLED(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#define LOWER4(a, b) SHUFFLED(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
#define UPPER4(a, b) SHUFFLED(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
#define LOWER2(a, b) SHUFFLED(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define UPPER2(a, b) SHUFFLED(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define LOWER1(a, b) SHUFFLED(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
#define UPPER1(a, b) SHUFFLED(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)

/* The sums of 16 vectors, each in its lane. Every sum is ((x0 + x8) + (x4 + x12)) + ... */
INLINE vec sums(vec v[LANES]) {
    for (int i = 0; i < 8; i++) v[i] = LOWER8(v[i], v[i + 8]) + UPPER8(v[i], v[i + 8]);
    for (int i = 0; i < 4; i++) v[i] = LOWER4(v[i], v[i + 4]) + UPPER4(v[i], v[i + 4]);
    for (int i = 0; i < 2; i++) v[i] = LOWER2(v[i], v[i + 2]) + UPPER2(v[i], v[i + 2]);
    return LOWER1(v[0], v[1]) + UPPER1(v[0], v[1]);
}

#define SWAP(half)                         \
    for (int i = 0; i < LANES; i++)        \
        if (!(i & half)) {                 \
            vec a = v[i], b = v[i + half]; \
            v[i] = LOWER##half(a, b);      \
            v[i + half] = UPPER##half(a, b); \
        }

/* Sixteen vectors become their columns. */
INLINE void transpose(vec v[LANES]) { SWAP(8) SWAP(4) SWAP(2) SWAP(1) }

INLINE float sum(vec v) {
    v = LOWER8(v, v) + UPPER8(v, v);
    v = LOWER4(v, v) + UPPER4(v, v);
    v = LOWER2(v, v) + UPPER2(v, v);
    return v[0] + v[1];
}

INLINE vec choose(ivec is_first, vec first, vec second) {
    return (vec)(((ivec)first & is_first) | ((ivec)second & ~is_first));
}

INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }

INLINE float largest_of(vec v) {
    v = larger(LOWER8(v, v), UPPER8(v, v));
    v = larger(LOWER4(v, v), UPPER4(v, v));
    v = larger(LOWER2(v, v), UPPER2(v, v));
    return MAX(v[0], v[1]);
}

/* e^x to about 1e-7 for x <= 0 and beyond; 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. */
INLINE vec exponential(vec x) {
    const vec low = splat(-87.0f), high = splat(88.0f), magic = splat(12582912.0f);
    x = choose(x < low, low, choose(x > high, high, x));
    vec shifted = x * 1.44269504f + magic; /* rounds to an integer in its low bits */
    vec n = shifted - magic;
    vec r = x - n * 0.693359375f - n * -2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec exponent = (ivec)shifted - (ivec)magic;
    return (vec)((ivec)p + (exponent << 23)) + (x - x); /* a NaN stays one */
}

#endif
