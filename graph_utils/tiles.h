// Inner products of 32 by 32 vectors in float32, in bfloat16 or in bytes: of the latter two by AMX or AVX-512's products
// where the CPU has them, else by float32 arithmetic, or of bytes by 16-bit arithmetic.
//
// Vectors are stored as np words of 32 bits, np a multiple of 16, element 0 in the lowest bits: one element each in
// float32, two in bfloat16, four in bytes. A byte is an element plus 128, which is a multiple of the vector's scale, a
// float32 that follows as one more word. All ways are symmetric to the last bit, and independent of where in a tile a
// vector stands: they add the products in the same order for (a, b) as for (b, a), and products of bytes are whole numbers.
//
// A kernel multiplies a tile of up to 32 rows, put there one by one by row(), with a panel of 32 vectors: tile() writes
// the first n of s[32][32], and perhaps more.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__AVX512F__) && defined(__linux__)
#define TILES_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tiles {

constexpr int kTile = 32;

// Inlined into a larger function, the accumulators would not stay in registers.
#ifdef __GNUC__
#define TILES_APART __attribute__((noinline))
#else
#define TILES_APART
#endif

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

// Bits r of the n rows of s in which a number is greater than its column's bound, or than the row's.
inline uint32_t rows_above(const float* s, int n, const float* column_bounds, const float* row_bounds) {
    uint32_t rows = 0;
#ifdef __AVX512F__
    const __m512 left = _mm512_loadu_ps(column_bounds), right = _mm512_loadu_ps(column_bounds + 16);
    for (int r = 0; r < n; r++) {
        const __m512 b = _mm512_set1_ps(row_bounds[r]);
        const __m512 s0 = _mm512_loadu_ps(s + r * kTile), s1 = _mm512_loadu_ps(s + r * kTile + 16);
        const __mmask16 any = _mm512_cmp_ps_mask(s0, left, _CMP_GT_OQ) | _mm512_cmp_ps_mask(s1, right, _CMP_GT_OQ)
            | _mm512_cmp_ps_mask(s0, b, _CMP_GT_OQ) | _mm512_cmp_ps_mask(s1, b, _CMP_GT_OQ);
        rows |= (uint32_t)(any != 0) << r;
    }
#else
    for (int r = 0; r < n; r++)
        rows |= (uint32_t)((above_each(s + r * kTile, column_bounds) | above(s + r * kTile, row_bounds[r])) != 0) << r;
#endif
    return rows;
}

// ---- how vectors are stored

struct Bfloat16 {
    static constexpr int kPerWord = 2;
    static int64_t stride(int64_t np) { return np; }        // words from one vector to the next
    static float element(uint32_t word, int i) {
        word = i ? word & 0xffff0000u : word << 16;
        float x;
        std::memcpy(&x, &word, 4);
        return x;
    }
    static float scale(const uint32_t*, int64_t) { return 1.0f; }
};

struct Single {
    static constexpr int kPerWord = 1;
    static int64_t stride(int64_t np) { return np; }
    static float element(uint32_t word, int) {
        float x;
        std::memcpy(&x, &word, 4);
        return x;
    }
    static float scale(const uint32_t*, int64_t) { return 1.0f; }
};

struct Bytes {
    static constexpr int kPerWord = 4;
    static int64_t stride(int64_t np) { return np + 1; }
    static float element(uint32_t word, int i) { return (float)((int)(word >> 8 * i & 255) - 128); }
    static float scale(const uint32_t* x, int64_t np) {
        float s;
        std::memcpy(&s, x + np, 4);
        return s;
    }
};

template <class Format>
float inner_product(const uint32_t* x, const uint32_t* y, int64_t np) {
    float s = 0;
    for (int64_t w = 0; w < np; w++)
        for (int i = 0; i < Format::kPerWord; i++) s += Format::element(x[w], i) * Format::element(y[w], i);
    return s * (Format::scale(x, np) * Format::scale(y, np));
}

// Products of n rows of d numbers with a panel of d times 32, whose sums stay in registers: Kernel::kRows rows of them at a time.
// Kernel::add(sums, a, b) adds the products of a row's number with those of some columns; put(r, sums, end) takes the sums of row
// r, where `end` is what follows in the panel.
template <class Kernel, class Put>
inline void sum_in_registers(const void* rows, int n, const void* panel, int64_t d, Put put) {
    typedef typename Kernel::Sums Sums;
    constexpr int NV = 4 * kTile / sizeof(Sums);
    for (int r0 = 0; r0 < n; r0 += Kernel::kRows) {
        Sums sums[Kernel::kRows][NV] = {};
        const typename Kernel::Number* a = (const typename Kernel::Number*)rows + r0 * d;
        const Sums* b = (const Sums*)panel;
        for (int64_t i = 0; i < d; i++, b += NV)
            for (int r = 0; r < Kernel::kRows; r++)
                for (int v = 0; v < NV; v++) Kernel::add(sums[r][v], a[r * d + i], b[v]);
        for (int r = 0; r < Kernel::kRows; r++) put(r0 + r, sums[r], b);
    }
}

// ---- float32: a row is its elements; a panel holds 32 floats for each element; scales at the end of both

// What rows and panels of such numbers are: kPerWord of them, of 4 bytes, for each word w, element(w, 0), element(w, 1), ...
template <class F, class Number, int kPerWord, Number (*element)(uint32_t, int)>
struct Expanded {
    using Format = F;
    static int64_t tile_bytes(int64_t np) { return 4 * kTile * (kPerWord * np + 1); }
    static void begin() {}
    static void end() {}

    static void row(const uint32_t* x, int64_t np, void* rows, int r) {
        const int64_t d = kPerWord * np;
        Number* o = (Number*)rows + r * d;
        for (int64_t w = 0; w < np; w++)
            for (int i = 0; i < kPerWord; i++) o[kPerWord * w + i] = element(x[w], i);
        ((float*)rows)[kTile * d + r] = Format::scale(x, np);
    }

    static void panel(const uint32_t* const* x, int64_t np, void* out) {
        alignas(64) uint32_t words[16 * kTile];
        Number* o = (Number*)out;
        for (int64_t w = 0; w < np; w += 16) {
            transpose16(x, w, words, kTile);
            transpose16(x + 16, w, words + 16, kTile);
            for (int r = 0; r < 16; r++)
                for (int i = 0; i < kPerWord; i++, o += kTile)
                    for (int c = 0; c < kTile; c++) o[c] = element(words[r * kTile + c], i);
        }
        for (int c = 0; c < kTile; c++) ((float*)o)[c] = Format::scale(x[c], np);
    }
};

template <class F>
struct Float32 : Expanded<F, float, F::kPerWord, F::element> {
    using Format = F;

#if defined(__AVX512F__)
    static constexpr int kRows = 8, kWidth = 16;    // 16 accumulators of the 32 registers
#else
    static constexpr int kRows = 2, kWidth = 8;     // 8 accumulators of the 16 registers
#endif
    typedef float Number;
    typedef float Sums __attribute__((vector_size(4 * kWidth)));

    static void add(Sums& sums, float a, Sums b) { sums += a * b; }

    TILES_APART static void tile(const void* rows, int n, const void* panel, int64_t np, float* s) {
        const int64_t d = Format::kPerWord * np;
        const float* row_scales = (const float*)rows + kTile * d;
        sum_in_registers<Float32>(rows, n, panel, d, [=](int r, const Sums* sums, const Sums* scales) {
            for (int v = 0; v < kTile / kWidth; v++) {
                const Sums products = sums[v] * (row_scales[r] * scales[v]);
                std::memcpy(s + r * kTile + v * kWidth, &products, sizeof(products));
            }
        });
    }
};

// ---- as they are stored: a row is its words; scales of bytes at the end

struct Bfloat16Rows {
    using Format = Bfloat16;
    static int64_t tile_bytes(int64_t np) { return 4 * kTile * np; }
    static void row(const uint32_t* x, int64_t np, void* rows, int r) { std::memcpy((uint32_t*)rows + r * np, x, 4 * np); }
};

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define TILES_BF16
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define TILES_VNNI
#endif

#if defined(TILES_VNNI) || defined(TILES_AMX)
// 16 whole numbers times scales. (GCC 12 warns of its own _mm512_cvtepi32_ps.)
inline __m512 scaled(__m512i sums, __m512 scales) {
    typedef int32_t Numbers __attribute__((vector_size(64)));
    typedef float Floats __attribute__((vector_size(64)));
    return (__m512)__builtin_convertvector((Numbers)sums, Floats) * scales;
}

// Bytes are multiplied without sign (rows) by with sign (panels). A panel ends with scales, and with what takes the 128
// of the rows' bytes out again: -128 times the sum of each vector.
struct BytesRows {
    using Format = Bytes;
    static int64_t tile_bytes(int64_t np) { return 4 * kTile * (np + 2); }
    static void row(const uint32_t* x, int64_t np, void* rows, int r) {
        std::memcpy((uint32_t*)rows + r * np, x, 4 * np);
        std::memcpy((uint32_t*)rows + kTile * np + r, x + np, 4);
    }

    // What makes products of sums: of row r with the two halves of a panel.
    struct Ends {
        const float *rows, *panel;
        Ends(const void* rows, const void* panel, int64_t np)
            : rows((const float*)rows + kTile * np), panel((const float*)panel + kTile * np) {}
        void put(int r, __m512i left, __m512i right, float* s) const {
            const __m512 scale = _mm512_set1_ps(rows[r]);
            const __m512i start0 = _mm512_load_si512(panel + kTile), start1 = _mm512_load_si512(panel + kTile + 16);
            _mm512_storeu_ps(s + r * kTile, scaled(_mm512_add_epi32(left, start0), scale * _mm512_load_ps(panel)));
            _mm512_storeu_ps(s + r * kTile + 16, scaled(_mm512_add_epi32(right, start1), scale * _mm512_load_ps(panel + 16)));
        }
    };

    static void finish_panel(const uint32_t* const* x, int64_t np, uint32_t* words) {
        const __m512i bias = _mm512_set1_epi32((int)0x80808080u);
        for (int64_t i = 0; i < kTile * np; i += 16)
            _mm512_store_si512(words + i, _mm512_xor_si512(_mm512_load_si512(words + i), bias));
        words += kTile * np;
        for (int c = 0; c < kTile; c++) {
            __m512i sums = _mm512_setzero_si512();
            for (int64_t i = 0; i < np; i += 16)
                sums = _mm512_add_epi64(sums, _mm512_sad_epu8(_mm512_loadu_si512(x[c] + i), _mm512_setzero_si512()));
            int64_t sum = -512 * np;
            for (int i = 0; i < 8; i++) sum += sums[i];
            words[c] = x[c][np];
            words[kTile + c] = (uint32_t)(-128 * sum);
        }
    }
};
#endif

// ---- bytes as numbers of 16 bits, for CPUs without products of bytes: AVX2 multiplies twice as many of these as float32

#ifdef __AVX2__
#define TILES_INT16
// Two of the four bytes of a word, without the 128.
inline uint32_t pair_of_bytes(uint32_t word, int half) {
    const uint32_t bytes = word >> 16 * half;
    return (((bytes & 255) - 128) & 0xffff) | ((bytes >> 8 & 255) - 128) << 16;
}

struct Int16Bytes : Expanded<Bytes, uint32_t, 2, pair_of_bytes> {
#ifdef __AVX512BW__
    static constexpr int kRows = 8, kWidth = 16;    // 16 accumulators of the 32 registers
#else
    static constexpr int kRows = 2, kWidth = 8;     // 8 accumulators of the 16 registers
#endif
    typedef int32_t Number;
    typedef int32_t Sums __attribute__((vector_size(4 * kWidth)));
    typedef float Floats __attribute__((vector_size(4 * kWidth)));

    static void add(Sums& sums, int32_t a, Sums b) {
#ifdef __AVX512BW__
        sums += (Sums)_mm512_madd_epi16((__m512i)(Sums{} + a), (__m512i)b);
#else
        sums += (Sums)_mm256_madd_epi16((__m256i)(Sums{} + a), (__m256i)b);
#endif
    }

    TILES_APART static void tile(const void* rows, int n, const void* panel, int64_t np, float* s) {
        const float* row_scales = (const float*)rows + kTile * 2 * np;
        sum_in_registers<Int16Bytes>(rows, n, panel, 2 * np, [=](int r, const Sums* sums, const Sums* end) {
            for (int v = 0; v < kTile / kWidth; v++) {
                const Floats scales = row_scales[r] * ((const Floats*)end)[v];
                const Floats products = __builtin_convertvector(sums[v], Floats) * scales;
                std::memcpy(s + r * kTile + v * kWidth, &products, sizeof(products));
            }
        });
    }
};
#endif

// ---- AVX-512: a panel is np rows of 32 words

inline void panel_of_words(const uint32_t* const* x, int64_t np, uint32_t* out) {
    for (int64_t i = 0; i < np; i += 16) {
        transpose16(x, i, out + i * kTile, kTile);
        transpose16(x + 16, i, out + i * kTile + 16, kTile);
    }
}

#if defined(TILES_BF16) || defined(TILES_VNNI)
struct Avx512Words {
    static constexpr int kRows = 8;     // 16 accumulators of the 32 registers
    typedef int32_t Number;
    typedef __m512i Sums;
    static void begin() {}
    static void end() {}
};
#endif

#ifdef TILES_BF16
struct Avx512Bfloat16 : Bfloat16Rows, Avx512Words {
    static void panel(const uint32_t* const* x, int64_t np, void* out) { panel_of_words(x, np, (uint32_t*)out); }

    static void add(__m512i& sums, int32_t a, __m512i b) {
        sums = (__m512i)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
    }

    TILES_APART static void tile(const void* rows, int n, const void* panel, int64_t np, float* s) {
        sum_in_registers<Avx512Bfloat16>(rows, n, panel, np, [=](int r, const __m512i* sums, const __m512i*) {
            for (int v = 0; v < 2; v++) _mm512_storeu_si512(s + r * kTile + 16 * v, sums[v]);
        });
    }
};
#endif

#ifdef TILES_VNNI
struct Avx512Bytes : BytesRows, Avx512Words {
    static void panel(const uint32_t* const* x, int64_t np, void* out) {
        panel_of_words(x, np, (uint32_t*)out);
        finish_panel(x, np, (uint32_t*)out);
    }

    // not the intrinsic: GCC 12 copies its accumulators to other registers and back, a tenth of the time
    static void add(__m512i& sums, int32_t a, __m512i b) {
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(_mm512_set1_epi32(a)), "v"(b));
    }

    TILES_APART static void tile(const void* rows, int n, const void* panel, int64_t np, float* s) {
        const Ends ends(rows, panel, np);
        sum_in_registers<Avx512Bytes>(rows, n, panel, np, [=](int r, const __m512i* sums, const __m512i*) {
            ends.put(r, sums[0], sums[1], s);
        });
    }
};
#endif

// ---- AMX: a panel is, for each half of its vectors, np rows of 16 words

inline bool amx_available() {
#ifdef TILES_AMX
    // the kernel saves the tile registers of processes that asked for them only
    static const bool granted = __builtin_cpu_supports("avx512f") && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return granted;
#else
    return false;
#endif
}

#ifdef TILES_AMX
inline void amx_begin() {
    // palette 1; then from byte 16 the row lengths in bytes and from byte 48 the row counts of the eight tiles
    alignas(64) static const uint8_t config[64] = {
        1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 16, 16};
    _tile_loadconfig(config);
}

inline void amx_end() { _tile_release(); }

inline void amx_panel(const uint32_t* const* x, int64_t np, uint32_t* out) {
    for (int64_t i = 0; i < np; i += 16) {
        transpose16(x, i, out + i * 16, 16);
        transpose16(x + 16, i, out + (np + i) * 16, 16);
    }
}

// s (32 x 32 words) = rows times panel; tile instructions take their registers as constants, so this is a macro
#define AMX_TILE(MULTIPLY, rows, panel, np, s)                              \
    do {                                                                    \
        const uint32_t* a = (const uint32_t*)(rows);                        \
        const uint32_t* b = (const uint32_t*)(panel);                       \
        const int64_t stride = 4 * (np);                                    \
        /* the compiler does not know that these read and write memory */   \
        __asm__ volatile("" ::: "memory");                                  \
        _tile_zero(0);                                                      \
        _tile_zero(1);                                                      \
        _tile_zero(2);                                                      \
        _tile_zero(3);                                                      \
        for (int64_t i = 0; i < (np); i += 16) {                            \
            _tile_loadd(4, a + i, stride);                                  \
            _tile_loadd(6, b + i * 16, 64);                                 \
            MULTIPLY(0, 4, 6);                                              \
            _tile_loadd(7, b + ((np) + i) * 16, 64);                        \
            MULTIPLY(1, 4, 7);                                              \
            _tile_loadd(5, a + 16 * (np) + i, stride);                      \
            MULTIPLY(2, 5, 6);                                              \
            MULTIPLY(3, 5, 7);                                              \
        }                                                                   \
        _tile_stored(0, (s), 4 * kTile);                                    \
        _tile_stored(1, (s) + 16, 4 * kTile);                               \
        _tile_stored(2, (s) + 16 * kTile, 4 * kTile);                       \
        _tile_stored(3, (s) + 16 * kTile + 16, 4 * kTile);                  \
        __asm__ volatile("" ::: "memory");                                  \
    } while (0)

struct AmxBfloat16 : Bfloat16Rows {
    static void begin() { amx_begin(); }
    static void end() { amx_end(); }
    static void panel(const uint32_t* const* x, int64_t np, void* out) { amx_panel(x, np, (uint32_t*)out); }
    static void tile(const void* rows, int, const void* panel, int64_t np, float* s) {
        AMX_TILE(_tile_dpbf16ps, rows, panel, np, s);
    }
};

struct AmxBytes : BytesRows {
    static void begin() { amx_begin(); }
    static void end() { amx_end(); }
    static void panel(const uint32_t* const* x, int64_t np, void* out) {
        amx_panel(x, np, (uint32_t*)out);
        finish_panel(x, np, (uint32_t*)out);
    }
    static void tile(const void* rows, int, const void* panel, int64_t np, float* s) {
        alignas(64) int32_t sums[kTile * kTile];
        AMX_TILE(_tile_dpbusd, rows, panel, np, sums);
        const Ends ends(rows, panel, np);
        for (int r = 0; r < kTile; r++)
            ends.put(r, _mm512_load_si512(sums + r * kTile), _mm512_load_si512(sums + r * kTile + 16), s);
    }
};
#endif

}  // namespace tiles
