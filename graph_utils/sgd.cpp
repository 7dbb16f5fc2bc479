#include "sgd.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <vector>

#include "tiles.h"

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"      // GCC 12's own headers

namespace {

constexpr int64_t kTile = 32;           // all products are made of tiles of 32 x 32
constexpr int64_t kColumns = 512;       // of W that are worked on at a time: their X stays in the L2 cache
constexpr int64_t kDeep = 128;          // of these in one product: its left factor stays in the L1 cache

typedef float Vector __attribute__((vector_size(64), aligned(64)));
typedef int32_t Words __attribute__((vector_size(64), aligned(64)));
typedef uint32_t Unsigned __attribute__((vector_size(64), aligned(64)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(32), may_alias));       // memory that is read in words
constexpr int64_t kLanes = 16;

// Cuts scratch memory in pieces, or counts what they take.
class Scratch {
  public:
    explicit Scratch(uint8_t* p) : p_(p) {}
    char* take(int64_t bytes) {
        char* piece = (char*)p_ + used_;
        used_ += (bytes + 4095) / 4096 * 4096;
        return piece;
    }
    int64_t used() const { return used_; }

  private:
    uint8_t* p_;
    int64_t used_ = 0;
};

struct Numbers {        // a source for row()
    const float* x;
    Vector operator()(int64_t k) const { return *(const Vector*)(x + k); }
};

// The arithmetics. All take the left factor as `rows` (32 x K, made row by row) and the right one as a `panel`
// (K x N), at most 4 bytes per number. K is a multiple of 32 and N is 32; both may be 16 where kLeast is, for small
// mini-batches.
//
//   row(x, r, K, out)          number r of the 32 rows; x(k) gives its numbers k .. k + 15
//   panel_of_rows<N>(x, s, K, o)  the panel whose rows are K rows x, x + s, ... of N numbers
//   panel_of_columns<N>(...)   the panel whose columns are N rows x, x + s, ... of K numbers
//   product<N>(a, p, K, z, s, add)  z (32 x N, row stride s) = rows panel, or += if add

// Rows: for each 16 of their numbers those of all rows, so that a product finds them at constant distances.
struct Float32 {
    static constexpr int64_t kLeast = 16;       // images in a mini-batch, padded
    static void begin() {}
    static void end() {}

    template <class Source>
    static void row(Source x, int64_t r, int64_t K, void* out) {
        for (int64_t k = 0; k < K; k += kLanes) *(Vector*)((float*)out + k * kTile + r * kLanes) = x(k);
    }

    template <int64_t N>
    static void panel_of_rows(const float* x, int64_t stride, int64_t K, void* out) {
        for (int64_t k = 0; k < K; k++) std::memcpy((float*)out + k * N, x + k * stride, 4 * N);
    }

    template <int64_t N>
    static void panel_of_columns(const float* x, int64_t stride, int64_t K, void* out) {
        const uint32_t* rows[N];
        for (int64_t c = 0; c < N; c++) rows[c] = (const uint32_t*)(x + c * stride);
        for (int64_t k = 0; k < K; k += 16)
            for (int64_t c = 0; c < N; c += 16) tiles::transpose16(rows + c, k, (uint32_t*)out + k * N + c, N);
    }

#if defined(__AVX512F__)
    static constexpr int kWidth = 16, kSums = 16;   // of the 32 registers
#else
    static constexpr int kWidth = 8, kSums = 8;     // of the 16 registers
#endif
    typedef float Part __attribute__((vector_size(4 * kWidth), aligned(4)));

    template <int64_t N>
    static void product(const void* rows, const void* panel, int64_t K, float* z, int64_t stride, bool add) {
        constexpr int NV = N / kWidth, kRows = kSums / NV;
        for (int64_t r0 = 0; r0 < kTile; r0 += kRows) {
            Part sums[kRows][NV] = {};
            const float* a = (const float*)rows + r0 * kLanes;
            const Part* b = (const Part*)panel;
            for (int64_t k = 0; k < K; k += kLanes, a += kTile * kLanes)
                for (int i = 0; i < kLanes; i++, b += NV)
                    for (int r = 0; r < kRows; r++)
                        for (int v = 0; v < NV; v++) sums[r][v] += a[r * kLanes + i] * b[v];
            for (int r = 0; r < kRows; r++)
                for (int v = 0; v < NV; v++) {
                    Part* out = (Part*)(z + (r0 + r) * stride) + v;
                    *out = add ? *out + sums[r][v] : sums[r][v];
                }
        }
    }
};

// Every number rounded to bfloat16, two to a word: k and k + 1. Rows: 32 x K/2 words. Panel: for each 16 of its columns
// K/2 x 16 words.
struct Bfloat16 {
    static constexpr int64_t kLeast = Float32::kLeast;
    static void begin() {}
    static void end() {}

    static Unsigned rounded(Vector x) {         // to the nearest, ties to even; the result is the upper half
        const Unsigned bits = (Unsigned)x;
        return bits + 0x7fff + (bits >> 16 & 1);
    }
    static Halves halves(Vector x) { return __builtin_convertvector(rounded(x) >> 16, Halves); }

    template <class Source>
    static void row(Source x, int64_t r, int64_t K, void* out) {
        for (int64_t k = 0; k < K; k += kLanes) *(Halves*)((uint16_t*)out + r * K + k) = halves(x(k));
    }

    template <int64_t N>
    static void panel_of_rows(const float* x, int64_t stride, int64_t K, void* out) {
        for (int64_t c = 0; c < N; c += kLanes)
            for (int64_t k = 0; k < K; k += 2) {
                const Unsigned first = rounded(*(const Vector*)(x + k * stride + c));
                const Unsigned second = rounded(*(const Vector*)(x + (k + 1) * stride + c));
                *(Unsigned*)((uint32_t*)out + (c * K + k * kLanes) / 2) = first >> 16 | (second & 0xffff0000u);
            }
    }

    template <int64_t N>
    static void panel_of_columns(const float* x, int64_t stride, int64_t K, void* out) {
        alignas(64) uint32_t words[kLanes][kLanes];
        const uint32_t* columns[kLanes];
        for (int64_t i = 0; i < kLanes; i++) columns[i] = words[i];
        for (int64_t c = 0; c < N; c += kLanes)
            for (int64_t k = 0; k < K; k += 2 * kLanes) {
                for (int64_t i = 0; i < kLanes; i++)
                    row(Numbers{x + (c + i) * stride + k}, i, 2 * kLanes, words);
                tiles::transpose16(columns, 0, (uint32_t*)out + (c * K + k * kLanes) / 2, kLanes);
            }
    }

    // sums += a b, for both numbers in each word
    static void add_products(Vector& sums, Unsigned a, Unsigned b) {
#ifdef TILES_BF16
        sums = (Vector)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
        sums += (Vector)(a << 16) * (Vector)(b << 16);
        sums += (Vector)(a & 0xffff0000u) * (Vector)(b & 0xffff0000u);
#endif
    }

    template <int64_t N>
    static void product(const void* rows, const void* panel, int64_t K, float* z, int64_t stride, bool add) {
        constexpr int NV = N / kLanes, kRows = Float32::kSums * Float32::kWidth / kLanes / NV;
        for (int64_t r0 = 0; r0 < kTile; r0 += kRows) {
            Vector sums[kRows][NV] = {};
            const uint32_t* a = (const uint32_t*)rows + r0 * K / 2;
            for (int64_t k = 0; k < K / 2; k++)
                for (int r = 0; r < kRows; r++)
                    for (int v = 0; v < NV; v++)
                        add_products(sums[r][v], Unsigned{} + a[r * K / 2 + k],
                                     *((const Unsigned*)panel + v * K / 2 + k));
            for (int r = 0; r < kRows; r++)
                for (int v = 0; v < NV; v++) {
                    Vector* out = (Vector*)(z + (r0 + r) * stride) + v;
                    *out = add ? *out + sums[r][v] : sums[r][v];
                }
        }
    }
};

#ifdef TILES_AMX
// The sums of a tile of 32 x 32 are in the tile registers 0 .. 3; the compiler does not know that these read and write
// memory.
inline void load_sums(const float* z, int64_t stride, bool add) {
    __asm__ volatile("" ::: "memory");
    if (add) {
        _tile_loadd(0, z, 4 * stride);
        _tile_loadd(1, z + 16, 4 * stride);
        _tile_loadd(2, z + 16 * stride, 4 * stride);
        _tile_loadd(3, z + 16 * stride + 16, 4 * stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
}

inline void store_sums(float* z, int64_t stride) {
    _tile_stored(0, z, 4 * stride);
    _tile_stored(1, z + 16, 4 * stride);
    _tile_stored(2, z + 16 * stride, 4 * stride);
    _tile_stored(3, z + 16 * stride + 16, 4 * stride);
    __asm__ volatile("" ::: "memory");
}

struct AmxBfloat16 : Bfloat16 {
    static constexpr int64_t kLeast = kTile;
    static void begin() { tiles::amx_begin(); }
    static void end() { tiles::amx_end(); }

    template <int64_t N>
    static void product(const void* rows, const void* panel, int64_t K, float* z, int64_t stride, bool add) {
        static_assert(N == kTile, "AMX tiles are of one size");
        const uint16_t *a = (const uint16_t*)rows, *a2 = a + 16 * K;
        const uint32_t *b = (const uint32_t*)panel, *b2 = b + 8 * K;
        load_sums(z, stride, add);
        for (int64_t k = 0; k < K; k += 32) {
            _tile_loadd(4, a + k, 2 * K);
            _tile_loadd(6, b + k * 8, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b2 + k * 8, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a2 + k, 2 * K);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        store_sums(z, stride);
    }
};

// x = high + low up to 2^-17 of x, both bfloat16. A word holds two numbers, k and k + 16 of each 32: the sum over k may
// go in any order. Rows: 32 x K/2 words of high numbers, then of low ones. Panel: for each half of its columns K/2 x 16
// words of high numbers, then of low ones.
struct Split {
    static constexpr int64_t kLeast = kTile;
    static void begin() { tiles::amx_begin(); }
    static void end() { tiles::amx_end(); }

    static Words bits(Vector x) { return (Words)x; }

    static void split(Vector a, Vector b, void* high, void* low) {
        const Words mask = Words{} - 65536;         // upper half of each word
        const Words high_a = (bits(a) + 0x8000) & mask, high_b = (bits(b) + 0x8000) & mask;      // rounded
        *(Words*)high = (Words)((Unsigned)high_a >> 16) | high_b;
        const Words low_a = bits(a - (Vector)high_a) + 0x8000, low_b = bits(b - (Vector)high_b) + 0x8000;
        *(Words*)low = (Words)((Unsigned)low_a >> 16) | (low_b & mask);
    }

    template <class Source>
    static void row(Source x, int64_t r, int64_t K, void* out) {
        uint32_t *high = (uint32_t*)out + r * K / 2, *low = high + kTile * K / 2;
        for (int64_t k = 0; k < K; k += 32) split(x(k), x(k + 16), high + k / 2, low + k / 2);
    }

    template <int64_t N>
    static void panel_of_rows(const float* x, int64_t stride, int64_t K, void* out) {
        static_assert(N == kTile, "AMX tiles are of one size");
        for (int64_t half = 0; half < 2; half++) {
            uint32_t *high = (uint32_t*)out + half * 16 * K, *low = high + 8 * K;
            for (int64_t k = 0; k < K; k += 32)
                for (int64_t w = k; w < k + 16; w++) {
                    const int64_t at = (k / 2 + w - k) * 16;
                    split(*(const Vector*)(x + w * stride + 16 * half), *(const Vector*)(x + (w + 16) * stride + 16 * half),
                          high + at, low + at);
                }
        }
    }

    template <int64_t N>
    static void panel_of_columns(const float* x, int64_t stride, int64_t K, void* out) {
        static_assert(N == kTile, "AMX tiles are of one size");
        alignas(64) uint32_t words[2][kTile][16];
        for (int64_t k = 0; k < K; k += 32) {
            for (int64_t c = 0; c < kTile; c++)
                split(*(const Vector*)(x + c * stride + k), *(const Vector*)(x + c * stride + k + 16), words[0][c], words[1][c]);
            for (int64_t half = 0; half < 2; half++)
                for (int64_t part = 0; part < 2; part++) {
                    const uint32_t* rows[16];
                    for (int64_t c = 0; c < 16; c++) rows[c] = words[part][16 * half + c];
                    tiles::transpose16(rows, 0, (uint32_t*)out + half * 16 * K + part * 8 * K + k * 8, 16);
                }
        }
    }

    template <int64_t N>
    static void product(const void* rows, const void* panel, int64_t K, float* z, int64_t stride, bool add) {
        static_assert(N == kTile, "AMX tiles are of one size");
        const uint16_t *a = (const uint16_t*)rows, *low_a = a + kTile * K;
        const uint32_t *b = (const uint32_t*)panel, *b2 = b + 16 * K;
        load_sums(z, stride, add);
        for (int64_t k = 0; k < K; k += 32) {
            _tile_loadd(6, b + k * 8, 64);
            _tile_loadd(4, low_a + k, 2 * K);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b2 + k * 8, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, low_a + 16 * K + k, 2 * K);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            _tile_loadd(4, a + k, 2 * K);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a + 16 * K + k, 2 * K);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            _tile_loadd(6, b + 8 * K + k * 8, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
            _tile_loadd(7, b2 + 8 * K + k * 8, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        store_sums(z, stride);
    }
};
#endif

struct Sum {            // alpha x + beta y
    float alpha;
    const float* x;
    float beta;
    const float* y;
    Vector operator()(int64_t k) const { return alpha * *(const Vector*)(x + k) + beta * *(const Vector*)(y + k); }
};

struct Scaled {
    float factor;
    const float* x;
    Vector operator()(int64_t k) const { return factor * *(const Vector*)(x + k); }
};

struct Pass {
    int64_t G, C, dpad;
    float mom;
    const float *lr, *wd;
    float *W, *M, *b, *mb;
    int64_t T0, Bpad;
    const float *X0, *P;
    int64_t T1, B1pad;
    const float *X1, *ahead;
    float* Z;

    int64_t classifier(int64_t row) const { return std::min(row / C, G - 1); }

    void biases(int64_t i) const {
        for (int64_t row = kTile * i; row < kTile * (i + 1); row++) {
            const int64_t g = classifier(row);
            for (int64_t s = 0; s < T0; s++) {
                double gradient = 0;
                for (int64_t j = 0; j < Bpad; j++) gradient += P[(row * T0 + s) * Bpad + j];
                mb[row] = mom * mb[row] + ((float)gradient + wd[g] * b[row]);
                b[row] -= lr[g] * mb[row];
            }
            for (int64_t t = 0; t < T1; t++) {
                const float* factor = ahead + 2 * (g * T1 + t);
                std::fill_n(Z + (row * T1 + t) * B1pad, B1pad, factor[0] * b[row] + factor[1] * mb[row]);
            }
        }
    }

    // panels of X0 and X1, rows of P; then for each thread rows of W and gradients
    struct Memory {
        char *panels0, *panels1, *rows0, *each;
        int64_t each_bytes;
        Memory(const Pass& p, Scratch& scratch)
            : panels0(scratch.take(4 * p.T0 * p.Bpad * p.dpad)), panels1(scratch.take(4 * p.T1 * p.B1pad * p.dpad)),
              rows0(scratch.take(4 * p.T0 * p.Bpad * p.nblock() * kTile)), each(nullptr),
              each_bytes(4 * kTile * kDeep + 4 * kTile * kTile * p.T0 * p.group()) {
            each = scratch.take(omp_get_max_threads() * each_bytes);
        }
    };

    int64_t nblock() const { return (G * C + kTile - 1) / kTile; }
    // tiles of W whose gradients are computed at a time, so that their factors stay in the L1 cache
    int64_t group() const { return std::min<int64_t>(4, std::max<int64_t>(1, Bpad / kTile)); }

    void reserve(Scratch& scratch) const { Memory(*this, scratch); }

    template <class Arithmetic, int64_t N>
    void run(uint8_t* scratch_memory) const {
        const int64_t nblock = this->nblock(), nchunk = (dpad + kColumns - 1) / kColumns, group = this->group();
        const int64_t ndeep = (dpad + kDeep - 1) / kDeep, ntile = dpad / kTile, nb1 = B1pad / N;
        const int64_t P_bytes = 4 * kTile * Bpad;
        Scratch scratch(scratch_memory);
        const Memory memory(*this, scratch);
        char *panels0 = memory.panels0, *panels1 = memory.panels1, *rows0 = memory.rows0;
#pragma omp parallel
        {
            char* rows1 = memory.each + omp_get_thread_num() * memory.each_bytes;
            float* gradients = (float*)(rows1 + 4 * kTile * kDeep);
            Arithmetic::begin();
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < ntile * T0; i++)        // panel of column tile i / T0, mini-batch i % T0
                Arithmetic::template panel_of_rows<kTile>(X0 + i % T0 * Bpad * dpad + i / T0 * kTile, dpad, Bpad,
                                                          panels0 + i * P_bytes);
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < ndeep * T1 * nb1; i++) {
                const int64_t j = i / (T1 * nb1) * kDeep, deep = std::min(kDeep, dpad - j), k = i % (T1 * nb1);
                Arithmetic::template panel_of_columns<N>(X1 + k * N * dpad + j, dpad, deep,
                                                         panels1 + 4 * (j * T1 * B1pad + k * N * deep));
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < nblock; i++) {
                for (int64_t s = 0; s < T0; s++)
                    for (int64_t r = 0; r < kTile; r++)
                        Arithmetic::row(Numbers{P + ((kTile * i + r) * T0 + s) * Bpad}, r, Bpad, rows0 + (i * T0 + s) * P_bytes);
                biases(i);
            }
            for (int64_t chunk = 0; chunk < nchunk; chunk++) {
                const int64_t j0 = chunk * kColumns, width = std::min(kColumns, dpad - j0);
#pragma omp for schedule(static) nowait
                for (int64_t i = 0; i < nblock; i++) {
                    for (int64_t j = j0; T0 && j < j0 + width; j += group * kTile) {
                        const int64_t n = std::min(group, (j0 + width - j) / kTile);
                        for (int64_t s = 0; s < T0; s++)
                            for (int64_t k = 0; k < n; k++)
                                Arithmetic::template product<kTile>(
                                    rows0 + (i * T0 + s) * P_bytes, panels0 + ((j / kTile + k) * T0 + s) * P_bytes,
                                    Bpad, gradients + (k * T0 + s) * kTile * kTile, kTile, false);
                        for (int64_t k = 0; k < n; k++)
                            update(kTile * i, j + k * kTile, gradients + k * T0 * kTile * kTile, i + 1 < nblock);
                    }
                    for (int64_t t = 0; t < T1; t++) {
                        for (int64_t j = j0; j < j0 + width; j += kDeep) {
                            const int64_t deep = std::min(kDeep, dpad - j);
                            for (int64_t r = 0; r < kTile; r++) {
                                const int64_t row = kTile * i + r;
                                const float *factor = ahead + 2 * (classifier(row) * T1 + t);
                                Arithmetic::row(Sum{factor[0], W + row * dpad + j, factor[1], M + row * dpad + j}, r, deep, rows1);
                            }
                            for (int64_t k = 0; k < nb1; k++)
                                Arithmetic::template product<N>(
                                    rows1, panels1 + 4 * (j * T1 * B1pad + (t * nb1 + k) * N * deep), deep,
                                    Z + (kTile * i * T1 + t) * B1pad + k * N, T1 * B1pad, true);
                        }
                    }
                }
            }
            Arithmetic::end();
        }
    }

    // All T0 gradients of 32 x 32 parameters in turn.
    void update(int64_t row0, int64_t j, const float* gradients, bool more) const {
        for (int64_t r = 0; r < kTile; r++) {
            const int64_t at = (row0 + r) * dpad + j, g = classifier(row0 + r);
            const float rate = lr[g], decay = wd[g];
            if (more) {     // the parameters of the next rows arrive while these are worked on
                const int64_t next = at + kTile * dpad;
                __builtin_prefetch(W + next, 1, 2);
                __builtin_prefetch(W + next + kLanes, 1, 2);
                __builtin_prefetch(M + next, 1, 2);
                __builtin_prefetch(M + next + kLanes, 1, 2);
            }
            constexpr int NV = kTile / kLanes;
            Vector w[NV], m[NV];            // side by side: each waits for what it was before
            std::memcpy(w, W + at, sizeof(w));
            std::memcpy(m, M + at, sizeof(m));
            for (int64_t s = 0; s < T0; s++)
                for (int v = 0; v < NV; v++) {
                    const Vector gradient = ((const Vector*)(gradients + (s * kTile + r) * kTile))[v];
                    m[v] = mom * m[v] + (gradient + decay * w[v]);
                    w[v] -= rate * m[v];
                }
            std::memcpy(W + at, w, sizeof(w));
            std::memcpy(M + at, m, sizeof(m));
        }
    }
};

// x <- e^x for x <= 0, to about 1e-7 relative; 0 below -87.
inline void exponential(Vector& x) {
    const Words low = x < -87.0f;
    const Vector zero = {};
    x = low ? zero - 87.0f : x;
    Words n = __builtin_convertvector(x * 1.44269504f - 0.5f, Words);      // rounded, as x is not positive
    const Vector whole = __builtin_convertvector(n, Vector);
    const Vector r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;   // |r| <= ln 2 / 2, in two steps
    Vector e = r * (1.0f / 5040) + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    const Words power = (n + 127) << 23;
    Vector scale;
    std::memcpy(&scale, &power, sizeof(scale));
    x = low ? zero : e * scale;
}

struct Gradients {
    int64_t G, C, dpad, T, B, Bpad;
    const float* X;
    const int64_t* y;
    const float* response;
    float* Z;
    double* losses;

    // the images as rows and columns, their inner products and these as panels; rows of P for each thread
    struct Memory {
        char *rows, *columns, *inner, *panels, *each;
        int64_t each_bytes;
        Memory(const Gradients& p, Scratch& scratch)
            : rows(scratch.take(4 * p.whole() * p.dpad)), columns(scratch.take(4 * p.T * p.Bpad * p.dpad)),
              inner(scratch.take(4 * p.whole() * p.T * p.Bpad)), panels(scratch.take(4 * p.T * p.Bpad * p.T * p.Bpad)),
              each(nullptr), each_bytes(4 * kTile * p.Bpad) {
            each = scratch.take(omp_get_max_threads() * each_bytes);
        }
    };

    void reserve(Scratch& scratch) const { Memory(*this, scratch); }

    // images of all mini-batches, padded to whole tiles
    int64_t whole() const { return (T * Bpad + kTile - 1) / kTile * kTile; }

    template <class Arithmetic, int64_t N>
    void run(uint8_t* scratch_memory) const {
        const int64_t nblock = (G * C + kTile - 1) / kTile, nb = Bpad / N, all = T * Bpad;
        const int64_t ngroup = (Bpad + kLanes - 1) / kLanes;
        const int64_t rows_bytes = 4 * kTile * dpad, columns_bytes = 4 * N * dpad, panel_bytes = 4 * N * Bpad;
        const bool corrected = T > 1;
        Scratch scratch(scratch_memory);
        const Memory memory(*this, scratch);
        char *rows = memory.rows, *columns = memory.columns, *inner = memory.inner, *panels = memory.panels;
#pragma omp parallel
        {
            char* some = memory.each + omp_get_thread_num() * memory.each_bytes;
            Arithmetic::begin();
            if (corrected) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < all / N; i++) {
                    for (int64_t image = N * i; image < N * (i + 1); image++)
                        Arithmetic::row(Numbers{X + image * dpad}, image % kTile, dpad, rows + image / kTile * rows_bytes);
                    Arithmetic::template panel_of_columns<N>(X + N * i * dpad, dpad, dpad, columns + i * columns_bytes);
                }
                // inner products of the images of s with those of later t, as panels (T x nb) x T
#pragma omp for schedule(dynamic, 1)
                for (int64_t i = nb; i < all / N; i++) {
                    const int64_t t = i / nb;
                    float* products = (float*)inner + N * i;
                    // the last tile may hold images of t as well, which nobody looks at
                    for (int64_t j = 0; j * kTile < t * Bpad; j++)
                        Arithmetic::template product<N>(rows + j * rows_bytes, columns + i * columns_bytes, dpad,
                                                        products + kTile * j * all, all, false);
                    for (int64_t j = 0; j < t * Bpad; j++)
                        for (int64_t c = 0; c < N; c++) products[j * all + c] += 1;         // the bias
                    for (int64_t s = 0; s < t; s++)
                        Arithmetic::template panel_of_rows<N>(products + s * Bpad * all, all, Bpad,
                                                              panels + (i * T + s) * panel_bytes);
                }
            }
            for (int64_t t = 0; t < T; t++) {
                if (t) {
#pragma omp for schedule(static)
                    for (int64_t i = 0; i < nblock; i++)
                        for (int64_t s = 0; s < t; s++) {
                            for (int64_t r = 0; r < kTile; r++) {
                                const int64_t row = kTile * i + r, g = std::min(row / C, G - 1);
                                const float factor = response[g * T + t - s - 1];
                                Arithmetic::row(Scaled{factor, Z + row * all + s * Bpad}, r, Bpad, some);
                            }
                            for (int64_t k = 0; k < nb; k++)
                                Arithmetic::template product<N>(some, panels + ((t * nb + k) * T + s) * panel_bytes, Bpad,
                                                                Z + kTile * i * all + t * Bpad + k * N, all, true);
                        }
                }
#pragma omp for schedule(static)
                for (int64_t item = 0; item < G * ngroup; item++)
                    softmax(item / ngroup, t, item % ngroup * kLanes);
            }
            Arithmetic::end();
        }
    }

    // kLanes images of mini-batch t, from image i0
    void softmax(int64_t g, int64_t t, int64_t i0) const {
        const int64_t stride = T * Bpad, width = std::min(kLanes, B - i0);
        float* z = Z + g * C * stride + t * Bpad + i0;
        const auto at = [&](int64_t c) -> Vector& { return *(Vector*)(z + c * stride); };
        if (width <= 0) {
            for (int64_t c = 0; c < C; c++) at(c) = Vector{};
            return;
        }
        Vector top = at(0), sum = {}, valid = {};
        for (int64_t i = 0; i < width; i++) valid[i] = 1.0f / B;
        for (int64_t c = 1; c < C; c++) top = at(c) > top ? at(c) : top;
        const int64_t* own = y + t * B + i0;
        double* loss = losses + (t * G + g) * B + i0;
        for (int64_t i = 0; losses && i < width; i++) loss[i] = z[own[i] * stride + i];
        for (int64_t c = 0; c < C; c++) {
            Vector e = at(c) - top;
            exponential(e);
            sum += e;
            at(c) = e;
        }
        if (losses)
            for (int64_t i = 0; i < width; i++) loss[i] = std::log((double)sum[i]) - (loss[i] - (double)top[i]);
        const Vector scale = valid / sum;
        for (int64_t c = 0; c < C; c++) at(c) *= scale;
        for (int64_t i = 0; i < width; i++) z[own[i] * stride + i] -= 1.0f / B;
    }
};

void check_sizes(bool right, const char* what) {
    if (!right) throw std::invalid_argument(what);
}

// work.run() in an arithmetic, for mini-batches of Bpad images.
template <class Work>
void run_with(const Work& work, int arithmetic, int64_t Bpad, uint8_t* scratch) {
#ifdef TILES_AMX
    if (arithmetic != kFloat32 && sgd_has_tiles()) {
        arithmetic == kSplit ? work.template run<Split, kTile>(scratch) : work.template run<AmxBfloat16, kTile>(scratch);
        return;
    }
#endif
    const bool small = Bpad % kTile;
    if (arithmetic == kBfloat16)
        small ? work.template run<Bfloat16, Bfloat16::kLeast>(scratch) : work.template run<Bfloat16, kTile>(scratch);
    else
        small ? work.template run<Float32, Float32::kLeast>(scratch) : work.template run<Float32, kTile>(scratch);
}

}  // namespace

bool sgd_has_tiles() { return tiles::amx_available(); }

bool sgd_has_bfloat16() {
#ifdef TILES_BF16
    return true;
#else
    return sgd_has_tiles();
#endif
}

int64_t sgd_multiple(int arithmetic) {
    check_sizes(arithmetic >= kFloat32 && arithmetic <= kBfloat16, "there is no such arithmetic");
    return arithmetic != kFloat32 && sgd_has_tiles() ? kTile : Float32::kLeast;
}

int64_t sgd_scratch(int64_t G, int64_t C, int64_t dpad, int64_t T, int64_t Bpad) {
    Scratch pass(nullptr), gradients(nullptr);
    Pass{G, C, dpad, 0, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, T, Bpad, nullptr, nullptr, T, Bpad, nullptr,
         nullptr, nullptr}.reserve(pass);
    Gradients{G, C, dpad, T, 0, Bpad, nullptr, nullptr, nullptr, nullptr, nullptr}.reserve(gradients);
    return std::max(pass.used(), gradients.used());
}

void sgd_pass(int64_t G, int64_t C, int64_t dpad, float mom, const float* lr, const float* wd, float* W, float* M,
              float* b, float* mb, int64_t T0, int64_t Bpad, const float* X0, const float* P, int64_t T1,
              int64_t B1pad, const float* X1, const float* ahead, float* Z, int arithmetic, uint8_t* scratch) {
    check_sizes(G > 0 && C > 0 && dpad > 0 && dpad % kTile == 0 && T0 >= 0 && T1 >= 0 && Bpad >= 0 && B1pad >= 0
                    && Bpad % sgd_multiple(arithmetic) == 0 && B1pad % sgd_multiple(arithmetic) == 0,
                "sgd_pass: a size is not padded");
    const Pass pass{G, C, dpad, mom, lr, wd, W, M, b, mb, T0, Bpad, X0, P, T1, B1pad, X1, ahead, Z};
    run_with(pass, arithmetic, B1pad, scratch);
}

void sgd_gradients(int64_t G, int64_t C, int64_t dpad, int64_t T, int64_t B, int64_t Bpad, const float* X,
                   const int64_t* y, const float* response, float* Z, double* losses, int arithmetic, uint8_t* scratch) {
    check_sizes(G > 0 && C > 0 && T > 0 && B > 0 && B <= Bpad && dpad % kTile == 0 && Bpad % sgd_multiple(arithmetic) == 0,
                "sgd_gradients: a size is not padded");
    for (int64_t i = 0; i < T * B; i++) check_sizes(y[i] >= 0 && y[i] < C, "sgd_gradients: a class is out of range");
    const Gradients gradients{G, C, dpad, T, B, Bpad, X, y, response, Z, losses};
    run_with(gradients, arithmetic, Bpad, scratch);
}

void gather_batches(int64_t nX, int64_t d, const float* X, int64_t n, const int64_t* images, int64_t B, int64_t Bpad,
                    int64_t dpad, float* out) {
    for (int64_t i = 0; i < n; i++) check_sizes(images[i] >= 0 && images[i] < nX, "gather_batches: no such image");
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++)
        std::memcpy(out + (i / B * Bpad + i % B) * dpad, X + images[i] * d, 4 * d);
}

void ranks_of(int64_t G, int64_t C, int64_t B, int64_t stride, const float* Z, const int64_t* y, int32_t* ranks) {
    for (int64_t i = 0; i < B; i++) check_sizes(y[i] >= 0 && y[i] < C, "ranks_of: a class is out of range");
    constexpr int64_t kWidth = 4 * kLanes;
    const int64_t ngroup = (B + kWidth - 1) / kWidth;
#pragma omp parallel for schedule(static)
    for (int64_t item = 0; item < G * ngroup; item++) {
        const int64_t g = item / ngroup, i0 = item % ngroup * kWidth, width = std::min(kWidth, B - i0);
        const float* z = Z + g * C * stride + i0;
        float own[kWidth];
        int32_t before[kWidth] = {}, label[kWidth];
        for (int64_t i = 0; i < width; i++) {
            label[i] = (int32_t)y[i0 + i];
            own[i] = z[y[i0 + i] * stride + i];
        }
        for (int32_t c = 0; c < C; c++)
            for (int64_t i = 0; i < width; i++)
                before[i] += (z[c * stride + i] > own[i]) | ((z[c * stride + i] == own[i]) & (c < label[i]));
        for (int64_t i = 0; i < width; i++) ranks[g * B + i0 + i] = std::isnan(own[i]) ? std::numeric_limits<int32_t>::max() : before[i];
    }
}

void top_of(int64_t G, int64_t C, int64_t dpad, int64_t B, int64_t stride, int64_t most, const float* Z, const float* X,
            const float* x_norms, const float* W, const float* b, const float* w_norms, const int64_t* y, int64_t most_products,
            uint8_t* top) {
    for (int64_t i = 0; i < B; i++) check_sizes(y[i] >= 0 && y[i] < C, "top_of: a class is out of range");
    constexpr int64_t kWidth = 4 * kLanes;
    const int64_t ngroup = (B + kWidth - 1) / kWidth;
    const float sums = (dpad + 4) * 0x1p-24f;       // of so many terms at the most, with a rounding after each
    // |Z[row][i] - exact| <= n_x (l_w + sums n_w) + l_x n_w + sums |b|, for norms n and what rounding takes of them, l
    const auto bound = [&](int64_t row, float n_x, float l_x) {
        const float n_w = w_norms[2 * row], l_w = w_norms[2 * row + 1];
        return n_x * (l_w + sums * n_w) + l_x * n_w + (sums * std::abs(b[row]) + 1e-30f);
    };
    std::vector<int32_t> doubts(G * B);         // how many classes may come before or after
#pragma omp parallel for schedule(static)
    for (int64_t item = 0; item < G * ngroup; item++) {
        const int64_t g = item / ngroup, i0 = item % ngroup * kWidth, width = std::min(kWidth, B - i0);
        float low[kWidth], high[kWidth], n_x[kWidth], l_x[kWidth];
        int32_t above[kWidth] = {}, below[kWidth] = {};
        for (int64_t i = 0; i < width; i++) {
            const int64_t row = g * C + y[i0 + i];
            n_x[i] = x_norms[2 * (i0 + i)];
            l_x[i] = x_norms[2 * (i0 + i) + 1];
            const float own = Z[row * stride + i0 + i], error = bound(row, n_x[i], l_x[i]);
            low[i] = own - error;
            high[i] = own + error;
        }
        for (int64_t row = g * C; row < (g + 1) * C; row++)
            for (int64_t i = 0; i < width; i++) {
                const float z = Z[row * stride + i0 + i], error = bound(row, n_x[i], l_x[i]);
                above[i] += z - error > high[i];
                below[i] += z + error < low[i];
            }
        for (int64_t i = 0; i < width; i++) {
            const int64_t at = g * B + i0 + i, others = C - 1 - above[i] - below[i];        // a NaN is neither
            top[at] = above[i] >= most ? 0 : above[i] + others < most ? 1 : kUnknown;
            doubts[at] = (int32_t)others;
        }
    }
    for (int64_t g = 0; g < G; g++) {
        int64_t products = 0;
        for (int64_t i = g * B; i < (g + 1) * B; i++) products += top[i] == kUnknown ? doubts[i] + 1 : 0;
        if (products > most_products) continue;
#pragma omp parallel for schedule(dynamic, 4)
        for (int64_t i = 0; i < B; i++) {
            if (top[g * B + i] != kUnknown) continue;
            const auto score = [&](int64_t row) {
                const float *w = W + row * dpad, *x = X + i * dpad;
                double parts[kLanes] = {}, sum = b[row];
                for (int64_t k = 0; k < dpad; k += kLanes)
                    for (int64_t l = 0; l < kLanes; l++) parts[l] += (double)w[k + l] * x[k + l];
                for (double part : parts) sum += part;
                return sum;
            };
            const auto error = [&](int64_t row) { return bound(row, x_norms[2 * i], x_norms[2 * i + 1]); };
            const int64_t own = g * C + y[i];
            const float low = Z[own * stride + i] - error(own), high = Z[own * stride + i] + error(own);
            const double exact = score(own);
            int64_t before = 0;
            for (int64_t row = g * C; row < (g + 1) * C && before < most; row++) {
                const float z = Z[row * stride + i];
                if (row == own || z + error(row) < low) continue;
                if (z - error(row) > high) {
                    before++;
                } else {
                    const double other = score(row);
                    before += other > exact || (other == exact && row < own);
                }
            }
            top[g * B + i] = !std::isnan(exact) && before < most;
        }
    }
}
