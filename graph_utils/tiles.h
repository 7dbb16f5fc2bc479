// Inner products of 32 by 32 vectors in bfloat16: by AMX or AVX-512's bfloat16 products where the CPU has them, else by
// float32 arithmetic.
//
// Vectors are stored as `np` pairs: element 2i in the lower half of word i, element 2i + 1 in the upper half. np is a
// multiple of 16. All ways add the products in the same order for (a, b) as for (b, a), so they are symmetric to the
// last bit, and independent of where in a tile a vector stands.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512F__) && defined(__linux__)
#define TILES_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tiles {

constexpr int kTile = 32;

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"      // false alarms of GCC 12 in its own headers
#pragma GCC diagnostic ignored "-Wuninitialized"
// 16 x 16 words: out[r * out_stride + c] = source[c][r].
inline void transpose16(const uint32_t* const* source, int64_t offset, uint32_t* out, int64_t out_stride) {
#ifdef __AVX512F__
    __m512i a[16], b[16];
    for (int c = 0; c < 16; c++) a[c] = _mm512_loadu_si512(source[c] + offset);
    for (int c = 0; c < 16; c += 2) {
        b[c] = _mm512_unpacklo_epi32(a[c], a[c + 1]);
        b[c + 1] = _mm512_unpackhi_epi32(a[c], a[c + 1]);
    }
    for (int c = 0; c < 16; c += 4)
        for (int i = 0; i < 2; i++) {
            a[c + 2 * i] = _mm512_unpacklo_epi64(b[c + i], b[c + i + 2]);
            a[c + 2 * i + 1] = _mm512_unpackhi_epi64(b[c + i], b[c + i + 2]);
        }
    // a[4 g + i], lane l of 128 bits: word 4 l + i of the sources 4 g .. 4 g + 3
    for (int i = 0; i < 4; i++) {
        const __m512i p = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), q = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
        const __m512i r = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88), s = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
        _mm512_storeu_si512(out + i * out_stride, _mm512_shuffle_i32x4(p, r, 0x88));
        _mm512_storeu_si512(out + (4 + i) * out_stride, _mm512_shuffle_i32x4(q, s, 0x88));
        _mm512_storeu_si512(out + (8 + i) * out_stride, _mm512_shuffle_i32x4(p, r, 0xdd));
        _mm512_storeu_si512(out + (12 + i) * out_stride, _mm512_shuffle_i32x4(q, s, 0xdd));
    }
#else
    for (int r = 0; r < 16; r++)
        for (int c = 0; c < 16; c++) out[r * out_stride + c] = source[c][offset + r];
#endif
}
#pragma GCC diagnostic pop

inline float lower(uint32_t word) {
    word <<= 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
}

inline float upper(uint32_t word) {
    word &= 0xffff0000u;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
}

// Bits c of the 32 numbers s[c] that are greater than bound.
inline uint32_t above(const float* s, float bound) {
#ifdef __AVX512F__
    const __m512 b = _mm512_set1_ps(bound);
    return (uint32_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(s), b, _CMP_GT_OQ)
        | (uint32_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(s + 16), b, _CMP_GT_OQ) << 16;
#elif defined(__AVX__)
    const __m256 b = _mm256_set1_ps(bound);
    uint32_t mask = 0;
    for (int i = 0; i < 4; i++)
        mask |= (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(s + 8 * i), b, _CMP_GT_OQ)) << (8 * i);
    return mask;
#else
    uint32_t mask = 0;
    for (int c = 0; c < kTile; c++) mask |= (uint32_t)(s[c] > bound) << c;
    return mask;
#endif
}

// The same against 32 bounds.
inline uint32_t above_each(const float* s, const float* bounds) {
#ifdef __AVX512F__
    return (uint32_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(s), _mm512_loadu_ps(bounds), _CMP_GT_OQ)
        | (uint32_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(s + 16), _mm512_loadu_ps(bounds + 16), _CMP_GT_OQ) << 16;
#else
    uint32_t mask = 0;
    for (int c = 0; c < kTile; c++) mask |= (uint32_t)(s[c] > bounds[c]) << c;
    return mask;
#endif
}

// ---- float32: a row is 2 np floats; a panel is 2 np rows of 32 floats

struct Float32 {
    static int64_t bytes(int64_t np) { return 8 * np; }     // of one vector, in rows and panels
    static void begin() {}
    static void end() {}

    static void row(const uint32_t* x, int64_t np, void* out) {
        float* o = (float*)out;
        for (int64_t i = 0; i < np; i++) {
            o[2 * i] = lower(x[i]);
            o[2 * i + 1] = upper(x[i]);
        }
    }

    // n <= 32 vectors that follow each other, as rows for tile(); `space` has room for 32
    static const void* rows(const uint32_t* x, int n, int64_t np, void* space) {
        for (int r = 0; r < n; r++) row(x + r * np, np, (char*)space + r * bytes(np));
        return space;
    }

    static void panel(const uint32_t* const* x, int64_t np, void* out) {
        alignas(64) uint32_t words[16 * kTile];
        float* o = (float*)out;
        for (int64_t i = 0; i < np; i += 16) {
            transpose16(x, i, words, kTile);
            transpose16(x + 16, i, words + 16, kTile);
            for (int r = 0; r < 16; r++)
                for (int c = 0; c < kTile; c++) {
                    o[(2 * (i + r)) * kTile + c] = lower(words[r * kTile + c]);
                    o[(2 * (i + r) + 1) * kTile + c] = upper(words[r * kTile + c]);
                }
        }
    }

#if defined(__AVX512F__)
    static constexpr int kRows = 8, kWidth = 16;    // 16 accumulators of the 32 registers
#else
    static constexpr int kRows = 2, kWidth = 8;     // 8 accumulators of the 16 registers
#endif
    typedef float Vector __attribute__((vector_size(4 * kWidth)));

    // s[32][32] = A B^T
    static void tile(const void* rows, const void* panel, int64_t np, float* s) {
        constexpr int NV = kTile / kWidth;
        const int64_t d = 2 * np;
        for (int r0 = 0; r0 < kTile; r0 += kRows) {
            Vector sums[kRows][NV] = {};
            const float* a = (const float*)rows + r0 * d;
            const Vector* b = (const Vector*)panel;
            for (int64_t i = 0; i < d; i++, b += NV)
                for (int r = 0; r < kRows; r++)
                    for (int v = 0; v < NV; v++) sums[r][v] += a[r * d + i] * b[v];
            for (int r = 0; r < kRows; r++) std::memcpy(s + (r0 + r) * kTile, sums[r], sizeof(sums[r]));
        }
    }
};

// ---- bfloat16: a row is the np words as they are

struct Words {
    static int64_t bytes(int64_t np) { return 4 * np; }

    static void row(const uint32_t* x, int64_t np, void* out) { std::memcpy(out, x, 4 * np); }

    static const void* rows(const uint32_t* x, int n, int64_t np, void* space) {
        if (n == kTile) return x;
        std::memcpy(space, x, 4 * n * np);
        return space;
    }
};

// ---- AVX-512 BF16: a panel is np rows of 32 words

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define TILES_BF16
struct Bf16 : Words {
    static void begin() {}
    static void end() {}

    static void panel(const uint32_t* const* x, int64_t np, void* out) {
        uint32_t* o = (uint32_t*)out;
        for (int64_t i = 0; i < np; i += 16) {
            transpose16(x, i, o + i * kTile, kTile);
            transpose16(x + 16, i, o + i * kTile + 16, kTile);
        }
    }

    static void tile(const void* rows, const void* panel, int64_t np, float* s) {
        constexpr int kRows = 8;        // 16 accumulators of the 32 registers
        for (int r0 = 0; r0 < kTile; r0 += kRows) {
            const uint32_t* a = (const uint32_t*)rows + r0 * np;
            const uint32_t* b = (const uint32_t*)panel;
            __m512 left[kRows], right[kRows];
            for (int r = 0; r < kRows; r++) left[r] = right[r] = _mm512_setzero_ps();
            for (int64_t i = 0; i < np; i++, b += kTile) {
                const __m512bh b0 = (__m512bh)_mm512_load_si512(b), b1 = (__m512bh)_mm512_load_si512(b + 16);
                for (int r = 0; r < kRows; r++) {
                    const __m512bh word = (__m512bh)_mm512_set1_epi32((int)a[r * np + i]);
                    left[r] = _mm512_dpbf16_ps(left[r], word, b0);
                    right[r] = _mm512_dpbf16_ps(right[r], word, b1);
                }
            }
            for (int r = 0; r < kRows; r++) {
                _mm512_storeu_ps(s + (r0 + r) * kTile, left[r]);
                _mm512_storeu_ps(s + (r0 + r) * kTile + 16, right[r]);
            }
        }
    }
};
#endif

// ---- AMX: a panel is, for each half of its vectors, np rows of 16 words

struct Amx : Words {
    static bool available() {
#ifdef TILES_AMX
        // the kernel saves the tile registers of processes that asked for them only
        static const bool granted = __builtin_cpu_supports("avx512f") && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
        return granted;
#else
        return false;
#endif
    }

#ifdef TILES_AMX
    static void begin() {
        // palette 1; then from byte 16 the row lengths in bytes and from byte 48 the row counts of the eight tiles
        alignas(64) static const uint8_t config[64] = {
            1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 16, 16};
        _tile_loadconfig(config);
    }
    static void end() { _tile_release(); }

    static void panel(const uint32_t* const* x, int64_t np, void* out) {
        uint32_t* o = (uint32_t*)out;
        for (int64_t i = 0; i < np; i += 16) {
            transpose16(x, i, o + i * 16, 16);
            transpose16(x + 16, i, o + (np + i) * 16, 16);
        }
    }

    static void tile(const void* rows, const void* panel, int64_t np, float* s) {
        const uint32_t* a = (const uint32_t*)rows;
        const uint32_t* b = (const uint32_t*)panel;
        const int64_t stride = 4 * np;
        // the compiler does not know that tile instructions read and write memory
        __asm__ volatile("" ::: "memory");
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t i = 0; i < np; i += 16) {
            _tile_loadd(4, a + i, stride);
            _tile_loadd(6, b + i * 16, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b + (np + i) * 16, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a + 16 * np + i, stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, s, 4 * kTile);
        _tile_stored(1, s + 16, 4 * kTile);
        _tile_stored(2, s + 16 * kTile, 4 * kTile);
        _tile_stored(3, s + 16 * kTile + 16, 4 * kTile);
        __asm__ volatile("" ::: "memory");
    }
#endif
};

}  // namespace tiles
