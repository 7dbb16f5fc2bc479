#include "neighbours.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <vector>

#include "entries.h"
#include "parallel.h"
#include "tiles.h"

namespace {

using tiles::kTile;

constexpr uint32_t kNumber = 0x7fffffffu;       // the greatest number, which no vector has
constexpr uint32_t kNew = 0x80000000u;          // marks new entries among lists of numbers
constexpr uint64_t kNewKey = 1;                 // and among keys
constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr int64_t kGroup = 1024;                // queries whose panels (512 KB at d = 256) stay in the L2 cache

// The ways to multiply that this machine has, fastest first.
std::vector<std::string> available_products() {
    std::vector<std::string> names{"float32"};
#ifdef TILES_INT16
    names.insert(names.begin(), "int16");
#endif
#if defined(TILES_BF16) || defined(TILES_VNNI)
    names.insert(names.begin(), "avx512");
#endif
    if (tiles::amx_available()) names.insert(names.begin(), "amx");
    return names;
}

// GRAPH_UTILS_PRODUCTS in the environment takes another one: to measure, or where others' results are not wanted.
std::string checked_products(const std::string& name) {
    const std::vector<std::string> names = available_products();
    if (name.empty()) return names[0];
    if (!std::count(names.begin(), names.end(), name))
        throw std::invalid_argument("products by '" + name + "' are not known, or not on this machine");
    return name;
}

std::string& chosen_products() {
    static std::string chosen = checked_products(std::getenv("GRAPH_UTILS_PRODUCTS") ? std::getenv("GRAPH_UTILS_PRODUCTS") : "");
    return chosen;
}

// ---- keys

inline uint64_t key_of(float s, uint32_t number) {
    uint32_t bits;
    std::memcpy(&bits, &s, 4);
    bits ^= (uint32_t)((int32_t)bits >> 31) | 0x80000000u;
    return (uint64_t)bits << 32 | (uint64_t)(kNumber - number) << 1;
}

inline float product_of(uint64_t key) {
    if (!key) return kNone;
    uint32_t bits = (uint32_t)(key >> 32);
    bits ^= bits & 0x80000000u ? 0x80000000u : 0xffffffffu;
    float s;
    std::memcpy(&s, &bits, 4);
    return s;
}

// The next lower number (std::nextafter is a call); of -inf itself.
inline float just_below(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x == 0) bits = (int32_t)0x80000001u;
    else if (x > 0) bits--;
    else if (x > kNone) bits++;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t number_of(uint64_t key) { return kNumber - ((uint32_t)key >> 1); }

// Bits for the first m of 32 columns.
inline uint32_t first_columns(int64_t m) { return m >= 32 ? ~0u : m <= 0 ? 0u : (1u << m) - 1; }

inline bool names_none(uint64_t key) { return number_of(key) == kNumber; }

// Memory aligned for whole vectors.
template <class T>
class Buffer {
  public:
    void reserve(size_t n) {
        if (n <= size_) return;
        data_.reset();
        data_.reset(static_cast<T*>(::operator new(n * sizeof(T) + 64, std::align_val_t(64))));
        size_ = n;
    }
    T* get() { return data_.get(); }

  private:
    struct Free {
        void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
    };
    std::unique_ptr<T, Free> data_;
    size_t size_ = 0;
};

// The best K keys of each of a group of queries, as they come. A list is cut back to not many more than K when it is full,
// so that a candidate costs a comparison, and one that passes a few operations more. Candidates as good as the worst are
// left out: among thousands of duplicates (unreadable images) all would pass.
class Lists {
  public:
    void start(int64_t n, int64_t K) {
        K_ = K;
        room_ = K == 1 ? 1 : K + std::max<int64_t>(K + K / 2, 16);
        keys_.reserve(n * room_);
        count.assign(n, 0);
        worst.assign(n, kNone);
    }
    void add(int64_t i, float s, uint32_t number) { add(i, key_of(s, number)); }
    void add(int64_t i, uint64_t key) {
        uint64_t* list = keys_.get() + i * room_;
        if (K_ == 1) {
            if (!count[i] || key > *list) *list = key;
            count[i] = 1;
            worst[i] = product_of(*list);
            return;
        }
        list[count[i]++] = key;
        if (count[i] == room_) cut(i);
    }
    // The K best, or all; in no order.
    uint64_t* best(int64_t i) {
        if (count[i] > K_) cut_exactly(i);
        return keys_.get() + i * room_;
    }
    void load(int64_t i, const int64_t* keys) {
        for (int64_t j = 0; j < K_; j++)
            if (keys[j]) add(i, (uint64_t)keys[j]);
        if (K_ > 1 && count[i] == K_) cut_exactly(i);
    }
    // load() of what may have the same vectors; those that it has not are marked as new.
    void join(int64_t i, const int64_t* keys) {
        uint64_t* list = best(i);
        auto known = [&](uint32_t number) {
            bool hit = false;
            for (int64_t j = 0; j < K_; j++) hit |= number_of(keys[j]) == number;
            return hit;
        };
        const uint64_t* const end = list + count[i];
        count[i] = 0;
        for (uint64_t *from = list; from < end; from++)
            if (!known(number_of(*from))) list[count[i]++] = *from | kNewKey;
        load(i, keys);
    }
    void store(int64_t i, int64_t* keys) {
        const uint64_t* list = best(i);
        for (int64_t j = 0; j < K_; j++) keys[j] = j < count[i] ? (int64_t)list[j] : 0;
    }

    std::vector<int32_t> count;
    std::vector<float> worst;

  private:
    // Keeps all keys from some value on that leaves K or a few more: found by halving, quicker than the K-th best.
    void cut(int64_t i) {
        uint64_t* list = keys_.get() + i * room_;
        const int64_t n = count[i], most = K_ + K_ / 4;
        uint64_t low = ~0ull, high = 0;
        for (int64_t j = 0; j < n; j++) {
            low = std::min(low, list[j]);
            high = std::max(high, list[j]);
        }
        int64_t kept = n;
        for (int step = 0; step < 16 && kept > most; step++) {
            const uint64_t middle = low + (high - low) / 2;
            int64_t above = 0;
            for (int64_t j = 0; j < n; j++) above += list[j] >= middle;
            if (above >= K_) {
                low = middle;
                kept = above;
            } else {
                high = middle;
            }
        }
        if (kept > most) return cut_exactly(i);
        int64_t at = 0;
        for (int64_t j = 0; j < n; j++) {
            list[at] = list[j];
            at += list[j] >= low;
        }
        count[i] = (int32_t)at;
        worst[i] = product_of(low);
    }
    void cut_exactly(int64_t i) {
        uint64_t* list = keys_.get() + i * room_;
        std::nth_element(list, list + K_ - 1, list + count[i], std::greater<uint64_t>());
        count[i] = (int32_t)K_;
        worst[i] = product_of(list[K_ - 1]);
    }

    int64_t K_ = 0, room_ = 0;
    Buffer<uint64_t> keys_;
};

// Lists of nodes from number `first` on that any thread may offer others to.
class Inserter {
  public:
    Inserter(int64_t K, uint64_t* keys, float* worst, int64_t first = 0)
        : K_(K), first_(first), keys_(keys), worst_(worst), locks_(kLocks) {
        for (auto& lock : locks_) lock.clear();
    }

    float worst(uint32_t a) const {
        float s;
        __atomic_load(worst_ + (a - first_), &s, __ATOMIC_RELAXED);
        return s;
    }

    // What an offer to a has to exceed: just below its worst, as one as good may have the lower number.
    float bound(uint32_t a) const { return just_below(worst(a)); }

    // Node b enters the list of a if it belongs there. The list is the best K of all that was offered, in any order.
    bool offer(uint32_t a, uint32_t b, float s) {
        const uint64_t key = key_of(s, b) | kNewKey;
        uint64_t* list = keys_ + (a - first_) * K_;
        // near nodes mostly know each other: that is seen without the lock, as entries are written in one piece and a
        // better one never leaves for a worse
        if (holds(list, key)) return false;
        std::atomic_flag& lock = locks_[a % kLocks];
        while (lock.test_and_set(std::memory_order_acquire)) {
        }
        int64_t least = 0;      // of equal ones the first
        for (int64_t j = 0; j < K_; j++)
            if (list[j] < list[least]) least = j;
        const bool enters = key > list[least] && !holds(list, key);
        if (enters) {
            __atomic_store_n(list + least, key, __ATOMIC_RELAXED);
            float worst = product_of(*std::min_element(list, list + K_));
            __atomic_store(worst_ + (a - first_), &worst, __ATOMIC_RELAXED);
        }
        lock.clear(std::memory_order_release);
        return enters;
    }

  private:
    // Whether the list has the key's node. An empty entry has number 2^31 - 1, which no node has.
    bool holds(const uint64_t* list, uint64_t key) const {
        uint64_t same = 0;
        for (int64_t j = 0; j < K_; j++) same |= (uint64_t)(((list[j] ^ key) & 0xfffffffeu) == 0);
        return same;
    }

    static constexpr uint32_t kLocks = 1 << 14;
    int64_t K_, first_;
    uint64_t* keys_;
    float* worst_;
    std::vector<std::atomic_flag> locks_;
};

// What rows do with the queries that they are compared with: nothing,
struct NoLists {
    bool takes(int64_t) const { return false; }
    float bound(int64_t) const { return 0; }
    void offer(int64_t, int32_t, float) {}
};

// or rows before `middle` take query q as numbers[q] into lists that all threads may offer others to,
struct SharedLists {
    Inserter& inserter;
    int64_t middle;
    const int32_t* numbers;
    bool takes(int64_t row) const { return row < middle; }
    float bound(int64_t row) const { return inserter.bound((uint32_t)row); }
    void offer(int64_t row, int32_t query, float s) { inserter.offer((uint32_t)row, (uint32_t)numbers[query], s); }
};

// or rows and queries are of one kind, and no other thread has these.
struct SameLists {
    Lists& lists;
    bool takes(int64_t) const { return true; }
    float bound(int64_t row) const { return lists.worst[row]; }
    void offer(int64_t row, int32_t query, float s) { lists.add(row, s, (uint32_t)query); }
};

// Products of gathered queries with stretches of base vectors. The queries are what is packed in panels, as there may be
// few of them for a long stretch, and rows are quickly laid out.
template <class Kernel>
class Scanner {
  public:
    Scanner() { Kernel::begin(); }
    ~Scanner() { Kernel::end(); }

    // Takes m queries; query(i) is the vector of the i-th, list_of(i) its number in `lists`.
    template <class Query, class ListOf>
    void queries(int64_t m, int64_t np, Query query, ListOf list_of) {
        const int64_t padded = (m + kTile - 1) / kTile * kTile;
        bytes_ = Kernel::tile_bytes(np);
        panels_.reserve(padded / kTile * bytes_);
        tile_.reserve(bytes_);
        list_.resize(padded);
        const uint32_t* source[kTile];
        for (int64_t i = 0; i < m; i += kTile) {
            for (int64_t c = 0; c < kTile; c++) source[c] = query(std::min(i + c, m - 1));
            Kernel::panel(source, np, panels_.get() + i / kTile * bytes_);
        }
        for (int64_t i = 0; i < m; i++) list_[i] = (int32_t)list_of(i);
        m_ = m;
        np_ = np;
    }

    // Compares them with rows first .. last - 1 of X, numbered from offset + first on. `rows` are the rows' own lists, which
    // the queries may enter.
    template <class Rows>
    void scan(const uint32_t* X, int64_t first, int64_t last, int64_t offset, Lists& lists, Rows rows) {
        scan_rows(X, first, last, [](int64_t j) { return j; }, offset, lists, rows);
    }

    // Compares them with the m rows of X that are listed.
    void scan_listed(const uint32_t* X, int64_t m, const int32_t* listed, Lists& lists) {
        scan_rows(X, 0, m, [listed](int64_t j) { return (int64_t)listed[j]; }, 0, lists, NoLists{});
    }

    Lists lists;

  private:
    template <class RowOf, class Rows>
    void scan_rows(const uint32_t* X, int64_t first, int64_t last, RowOf row_of, int64_t offset, Lists& lists, Rows rows) {
        worst_.resize(list_.size());
        for (int64_t i = 0; i < m_; i++) worst_[i] = lists.worst[list_[i]];
        for (size_t i = m_; i < list_.size(); i++) worst_[i] = std::numeric_limits<float>::infinity();
        const int64_t stride = Kernel::Format::stride(np_);
        for (int64_t j = first; j < last; j += kTile) {
            const int nr = (int)std::min<int64_t>(kTile, last - j);
            float bounds[kTile];        // what it takes to enter a row's list: it rises, so an old one lets too much through
            for (int r = 0; r < nr; r++) {
                Kernel::row(X + row_of(j + r) * stride, np_, tile_.get(), r);
                bounds[r] = rows.takes(j + r) ? rows.bound(j + r) : std::numeric_limits<float>::infinity();
            }
            for (int64_t i = 0; i < m_; i += kTile) {
                Kernel::tile(tile_.get(), nr, panels_.get() + i / kTile * bytes_, np_, products_);
                float* worst = worst_.data() + i;
                for (uint32_t left = tiles::rows_above(products_, nr, worst, bounds); left; left &= left - 1) {
                    const int r = __builtin_ctz(left);
                    const float* s = products_ + r * kTile;
                    for (uint32_t better = tiles::above_each(s, worst); better; better &= better - 1) {
                        const int c = __builtin_ctz(better);
                        const int32_t list = list_[i + c];
                        lists.add(list, s[c], (uint32_t)(offset + row_of(j + r)));
                        worst[c] = lists.worst[list];
                    }
                    if (!rows.takes(j + r)) continue;
                    bounds[r] = rows.bound(j + r);
                    for (uint32_t better = tiles::above(s, bounds[r]) & first_columns(m_ - i); better; better &= better - 1) {
                        const int c = __builtin_ctz(better);
                        rows.offer(j + r, list_[i + c], s[c]);
                    }
                }
            }
        }
    }

    Buffer<char> tile_, panels_;
    std::vector<int32_t> list_;
    std::vector<float> worst_;
    alignas(64) float products_[kTile * kTile];
    int64_t m_ = 0, np_ = 0, bytes_ = 0;
};

void check_width(int64_t np) {
    if (np <= 0 || np % 16) throw std::invalid_argument("vectors are padded to a multiple of 16 words");
}

void check_numbers(int64_t n) {
    if (n < 0 || n > (int64_t)kNumber) throw std::invalid_argument("at most 2^31 - 1 vectors");
}

template <class Kernel>
void search_all_with(int64_t nq, const uint32_t* Q, int64_t nb, const uint32_t* X, int64_t np, int64_t first,
                     int64_t K, int64_t* keys, int64_t x_K, uint64_t* x_keys, float* x_worst) {
    std::unique_ptr<Inserter> inserter;
    std::vector<int32_t> numbers;
    if (x_keys) {
        inserter.reset(new Inserter(x_K, x_keys, x_worst));
        numbers.resize(nq);
        std::iota(numbers.begin(), numbers.end(), 0);
    }
    const int64_t stride = Kernel::Format::stride(np);
    // as many equal groups for each thread as it takes for their lists to stay in cache
    const int64_t threads = omp_get_max_threads(), groups = threads * (nq / (threads * kGroup) + 1);
    const int64_t share = (nq + groups * kTile - 1) / (groups * kTile) * kTile;
    parallel_blocks<Scanner<Kernel>>(nq, std::max<int64_t>(share, kTile), [&](int64_t i0, int64_t i1, Scanner<Kernel>& scanner) {
        scanner.lists.start(i1 - i0, K);
        for (int64_t i = i0; i < i1; i++) scanner.lists.load(i - i0, keys + i * K);
        scanner.queries(i1 - i0, np, [&](int64_t i) { return Q + (i0 + i) * stride; }, [](int64_t i) { return i; });
        if (inserter)
            scanner.scan(X, 0, nb, first, scanner.lists, SharedLists{*inserter, nb, numbers.data() + i0});
        else
            scanner.scan(X, 0, nb, first, scanner.lists, NoLists{});
        for (int64_t i = i0; i < i1; i++) scanner.lists.store(i - i0, keys + i * K);
    });
}

// Products of a and b serve the lists of both. A pair of groups has its lists for itself, so pairs that are computed at the
// same time have no group in common.
template <class Kernel>
void search_self_with(int64_t first, int64_t last, const uint32_t* X, int64_t np, int64_t K, int64_t* keys) {
    const int64_t stride = Kernel::Format::stride(np);
    Lists lists;
    lists.start(last, K);
    parallel_blocks(last, kGroup, [&](int64_t i0, int64_t i1) {
        for (int64_t i = i0; i < i1; i++) lists.load(i, keys + i * K);
    });
    const int64_t size = 512;       // whatever the number of threads: which of equals are kept depends on it
    const int64_t nnew = (last - first + size - 1) / size, nold = (first + size - 1) / size;
    auto begin = [&](int64_t group) { return group < nold ? group * size : first + (group - nold) * size; };
    auto end = [&](int64_t group) { return std::min(begin(group) + size, group < nold ? first : last); };
    std::vector<std::pair<int64_t, int64_t>> pairs;
    auto compare = [&] {
        parallel_blocks<Scanner<Kernel>>(pairs.size(), 1, [&](int64_t p, int64_t, Scanner<Kernel>& scanner) {
            const int64_t a = pairs[p].first, b = pairs[p].second;
            scanner.queries(end(a) - begin(a), np, [&](int64_t i) { return X + (begin(a) + i) * stride; },
                            [&](int64_t i) { return begin(a) + i; });
            if (a == b)
                scanner.scan(X, begin(b), end(b), 0, lists, NoLists{});
            else
                scanner.scan(X, begin(b), end(b), 0, lists, SameLists{lists});
        });
        pairs.clear();
    };
    for (int64_t a = 0; a < nnew; a++) pairs.emplace_back(nold + a, nold + a);
    compare();
    // every new group meets every other, as in a tournament; the odd one of `seats` seats may be empty
    const int64_t seats = nnew + nnew % 2;
    for (int64_t round = 0; round + 1 < seats; round++) {
        for (int64_t t = 0; t < seats / 2; t++) {
            const int64_t a = t ? (round + t) % (seats - 1) : seats - 1, b = (round + seats - 1 - t) % (seats - 1);
            if (a < nnew && b < nnew) pairs.emplace_back(nold + a, nold + b);
        }
        compare();
    }
    for (int64_t round = 0; round < std::max(nold, nnew); round++) {
        for (int64_t t = 0; t < std::min(nold, nnew); t++)
            pairs.emplace_back(nold + (nnew <= nold ? t : (round + t) % nnew), nnew <= nold ? (round + t) % nold : t);
        compare();
    }
    parallel_blocks(last, kGroup, [&](int64_t i0, int64_t i1) {
        for (int64_t i = i0; i < i1; i++) lists.store(i, keys + i * K);
    });
}

// Base vectors that are listed for each group of queries.
struct Near {
    const int32_t* group;       // of each query
    const int64_t* offsets;
    const int32_t* listed;      // for group g from offsets[g] to offsets[g + 1] - 1

    // The query after the last one from i on that is of the same group; not beyond i1.
    int64_t run(int64_t i, int64_t i1) const {
        return std::find_if(group + i, group + i1, [&](int32_t g) { return g != group[i]; }) - group;
    }

    // Compares the scanner's queries with what is listed for query i.
    template <class Kernel>
    void scan(Scanner<Kernel>& scanner, const uint32_t* X, int64_t i, Lists& lists) const {
        const int64_t* offset = offsets + group[i];
        scanner.scan_listed(X, offset[1] - offset[0], listed + offset[0], lists);
    }
};

template <class Kernel>
void search_near_with(int64_t nq, const uint32_t* Q, const int32_t* order, int64_t np, Near near, const uint32_t* X, int64_t K,
                      int64_t* keys) {
    const int64_t stride = Kernel::Format::stride(np);
    auto row = [&](int64_t i) { return order ? (int64_t)order[i] : i; };
    const int64_t share = nq / (4 * omp_get_max_threads()) + 1;     // small, as lists differ in length
    parallel_blocks<Scanner<Kernel>>(nq, std::min(4 * kGroup, share), [&](int64_t i0, int64_t i1, Scanner<Kernel>& scanner) {
        for (int64_t i = i0, next; i < i1; i = next) {
            next = near.run(i, std::min(i1, i + kGroup));
            scanner.lists.start(next - i, K);
            scanner.queries(next - i, np, [&](int64_t j) { return Q + row(i + j) * stride; }, [](int64_t j) { return j; });
            near.scan(scanner, X, i, scanner.lists);
            for (int64_t j = i; j < next; j++) scanner.lists.store(j - i, keys + row(j) * K);
        }
    });
}

template <class Kernel>
struct CellScratch {
    Scanner<Kernel> coarse, fine;
    std::vector<int64_t> first;                                 // where the queries of each cell begin in `members`
    std::vector<int32_t> members, cells;
    Lists before;                                               // cells that were searched
    std::vector<int64_t> searched;                              // the last query that a cell was searched for, plus one
    std::vector<std::pair<int32_t, int32_t>> visits;            // (cell, query)
    std::vector<std::pair<float, int32_t>> order;
};

// Cells of query q in order of similarity until they hold K vectors: for the rare query whose nprobe nearest
// cells hold fewer.
template <class Kernel>
void more_cells(int32_t q, const uint32_t* x, int64_t np, int64_t nlist, const uint32_t* centroids, int64_t nprobe,
                int64_t K, const int64_t* begin, const int64_t* end, CellScratch<Kernel>& t) {
    const int64_t stride = Kernel::Format::stride(np);
    t.order.clear();
    for (int64_t c = 0; c < nlist; c++) {
        const float s = tiles::inner_product<typename Kernel::Format>(x, centroids + c * stride, np);
        t.order.emplace_back(-s, (int32_t)c);
    }
    std::sort(t.order.begin(), t.order.end());
    int64_t have = 0;
    for (int64_t i = 0; i < nlist && (i < nprobe || have < K); i++) {
        const int32_t c = t.order[i].second;
        have += end[c] - begin[c];
        t.visits.emplace_back(c, q);
    }
}

template <class Kernel>
void search_cells_with(int64_t nq, const uint32_t* Q, int64_t np, int64_t nlist, const uint32_t* centroids,
                       Near near, int64_t nprobe, Near near_before, int64_t before, const int64_t* begin,
                       const int64_t* end, const uint32_t* X, int64_t K, int64_t* keys, const int64_t* middle,
                       const int32_t* numbers, uint64_t* x_keys, float* x_worst) {
    const int64_t stride = Kernel::Format::stride(np);
    std::unique_ptr<Inserter> inserter;
    if (x_keys) inserter.reset(new Inserter(K, x_keys, x_worst));
    // each cell is read once per group: a larger one shares it among more queries, and fills more of the tiles, but what it
    // notes of their cells must not take too much memory. Whatever the number of threads: which of equals are kept depends on it
    constexpr int64_t kVisits = 1 << 19;
    int64_t size = std::clamp(std::min(nq / 64, kVisits / nprobe) / kGroup, (int64_t)1, (int64_t)8) * kGroup;
    if (size * nprobe > kVisits) size = std::max<int64_t>(kVisits / nprobe / kTile, 1) * kTile;
    parallel_blocks<CellScratch<Kernel>>(nq, size, [&](int64_t i0, int64_t i1, CellScratch<Kernel>& t) {
        const int64_t m = i1 - i0;
        const uint32_t* group = Q + i0 * stride;
        t.visits.clear();
        t.searched.assign(nlist, 0);
        const bool among_nearest = !near.listed && !near_before.listed;     // what was searched is the first of what is now
        for (int64_t j0 = 0, mj; j0 < m; j0 += mj) {
            mj = std::min(kGroup, m - j0);
            for (const Near& n : {near, near_before})
                if (n.listed) mj = n.run(i0 + j0, i0 + j0 + mj) - (i0 + j0);
            t.coarse.queries(mj, np, [&](int64_t i) { return group + (j0 + i) * stride; }, [](int64_t i) { return i; });
            auto nearest = [&](const Near& n, int64_t count, Lists& lists) {
                lists.start(mj, count);
                if (n.listed)
                    n.scan(t.coarse, centroids, i0 + j0, lists);
                else
                    t.coarse.scan(centroids, 0, nlist, 0, lists, NoLists{});
            };
            nearest(near, nprobe, t.coarse.lists);
            if (before && !among_nearest) nearest(near_before, before, t.before);
            for (int64_t i = 0; i < mj; i++) {
                const uint64_t* const best = t.coarse.lists.best(i);
                if (before) {
                    Lists& lists = among_nearest ? t.coarse.lists : t.before;
                    uint64_t* const searched = lists.best(i);
                    const int64_t count = std::min<int64_t>(before, lists.count[i]);
                    std::nth_element(searched, searched + count - 1, searched + lists.count[i], std::greater<uint64_t>());
                    for (int64_t j = 0; j < count; j++) t.searched[number_of(searched[j])] = j0 + i + 1;
                }
                const size_t visits = t.visits.size();
                int64_t have = 0;
                for (int64_t j = 0; j < t.coarse.lists.count[i]; j++) {
                    const int32_t c = (int32_t)number_of(best[j]);
                    have += end[c] - begin[c];
                    if (t.searched[c] != j0 + i + 1) t.visits.emplace_back(c, (int32_t)(j0 + i));
                }
                if (have < K && nprobe < nlist) {
                    t.visits.resize(visits);
                    more_cells((int32_t)(j0 + i), group + (j0 + i) * stride, np, nlist, centroids, nprobe, K, begin,
                               end, t);
                }
            }
        }
        // queries by cell
        t.first.assign(nlist + 2, 0);       // while members are listed, where cell c goes on is at c + 1
        for (const auto& visit : t.visits) t.first[visit.first + 2]++;
        for (int64_t c = 0; c < nlist; c++) t.first[c + 2] += t.first[c + 1];
        t.members.resize(t.visits.size());
        for (const auto& visit : t.visits) t.members[t.first[visit.first + 1]++] = visit.second;
        // the cells that most queries ask for are the nearest: taken first, they raise the bar for the others
        t.cells.clear();
        for (int64_t c = 0; c < nlist; c++)
            if (t.first[c + 1] > t.first[c] && end[c] > begin[c]) t.cells.push_back((int32_t)c);
        std::sort(t.cells.begin(), t.cells.end(), [&](int32_t a, int32_t b) {
            const int64_t na = t.first[a + 1] - t.first[a], nb = t.first[b + 1] - t.first[b];
            return na != nb ? na > nb : a < b;
        });
        Lists& lists = t.fine.lists;
        lists.start(m, K);
        for (int64_t i = 0; i < m; i++)
            if (const int64_t* list = keys + (i0 + i) * K; before)
                lists.worst[i] = product_of(*std::min_element((const uint64_t*)list, (const uint64_t*)list + K));
            else
                lists.load(i, list);
        for (const int32_t c : t.cells) {
            for (int64_t e = t.first[c]; e < t.first[c + 1]; e += kGroup) {
                const int32_t* members = t.members.data() + e;
                t.fine.queries(std::min(kGroup, t.first[c + 1] - e), np,
                               [&](int64_t i) { return group + members[i] * stride; }, [&](int64_t i) { return members[i]; });
                if (inserter)
                    t.fine.scan(X, begin[c], end[c], 0, lists, SharedLists{*inserter, middle[c], numbers + i0});
                else
                    t.fine.scan(X, begin[c], end[c], 0, lists, NoLists{});
            }
        }
        for (int64_t i = 0; i < m; i++) {
            if (before) lists.join(i, keys + (i0 + i) * K);
            lists.store(i, keys + (i0 + i) * K);
        }
    });
}

template <class Kernel>
struct OneToMany {
    OneToMany() { Kernel::begin(); }
    ~OneToMany() { Kernel::end(); }
    Buffer<char> row, panel;
    std::vector<uint32_t> others, next;
    alignas(64) float products[kTile * kTile];
};

template <class Kernel>
void known_lists_with(int64_t n, const uint32_t* X, int64_t np, const int32_t* order, const int32_t* position, int64_t n0,
                      int64_t k, const int32_t* I, float margin, int64_t K, uint64_t* keys) {
    const int64_t stride = Kernel::Format::stride(np);
    parallel_blocks<OneToMany<Kernel>>(n, 256, [&](int64_t i0, int64_t i1, OneToMany<Kernel>& t) {
        t.row.reserve(Kernel::tile_bytes(np));
        t.panel.reserve(Kernel::tile_bytes(np));
        // the rows of a node's neighbours; their vectors arrive while another node is computed
        auto look_up = [&](int64_t p, std::vector<uint32_t>& rows) {
            rows.clear();
            if (p >= i1 || order[p] >= n0) return;
            const int32_t* known = I + order[p] * k;
            for (int64_t j = 0; j < k && known[j] >= 0; j++) rows.push_back((uint32_t)position[known[j]]);
            for (const uint32_t u : rows)
                for (int64_t w = 0; w < stride; w += 16) __builtin_prefetch(X + (int64_t)u * stride + w);
        };
        look_up(i0, t.next);
        for (int64_t p = i0; p < i1; p++) {
            std::swap(t.others, t.next);
            look_up(p + 1, t.next);
            uint64_t* list = keys + p * K;
            std::fill(list, list + K, (uint64_t)0);
            const int64_t m = (int64_t)t.others.size();
            if (m) Kernel::row(X + p * stride, np, t.row.get(), 0);
            float least = std::numeric_limits<float>::infinity();
            for (int64_t j0 = 0; j0 < m; j0 += kTile) {
                const uint32_t* source[kTile];
                for (int64_t c = 0; c < kTile; c++) source[c] = X + (int64_t)t.others[std::min(j0 + c, m - 1)] * stride;
                Kernel::panel(source, np, t.panel.get());
                Kernel::tile(t.row.get(), 1, t.panel.get(), np, t.products);
                for (int64_t j = j0; j < std::min(m, j0 + kTile); j++) {
                    list[j] = key_of(t.products[j - j0], t.others[j]);
                    least = std::min(least, t.products[j - j0]);
                }
            }
            if (m == k) std::fill(list + k, list + K, key_of(least - margin, kNumber));
        }
    });
}

// ---- neighbours of neighbours

inline uint32_t mixed(uint32_t x) {     // integer hash (Wellons' triple32 constants)
    x ^= x >> 17;
    x *= 0xed5ad4bbu;
    x ^= x >> 11;
    x *= 0xac4c1b51u;
    x ^= x >> 15;
    x *= 0x31848babu;
    return x ^ x >> 14;
}

// The neighbours and reverse neighbours of one node, the new ones first.
struct Neighbourhood {
    std::vector<uint32_t> nodes;
    std::vector<int64_t> targets;       // where nodes has those whose lists are worked on, of find_targets()
    int64_t nnew = 0;

    // reverse: the nodes that have v as their neighbour, up to `end`.
    template <class Sampled>
    void gather(int64_t v, int64_t K, const int32_t* lists, const int32_t* reverse, const int32_t* end, int64_t R,
                uint32_t seed, Sampled& sampled) {
        nodes.clear();
        for (int64_t j = 0; j < K; j++)
            if (lists[v * K + j] != -1) nodes.push_back((uint32_t)lists[v * K + j]);
        const size_t nforward = nodes.size();
        sampled.clear();
        for (; reverse < end; reverse++) {
            const uint32_t u = (uint32_t)*reverse;
            bool known = false;
            for (size_t j = 0; j < nforward; j++) known |= ((nodes[j] ^ u) & kNumber) == 0;
            if (!known) sampled.emplace_back(mixed((u & kNumber) ^ mixed((uint32_t)v ^ seed)), u);
        }
        if ((int64_t)sampled.size() > R) {
            std::nth_element(sampled.begin(), sampled.begin() + R, sampled.end());
            sampled.resize(R);
        }
        for (const auto& entry : sampled) nodes.push_back(entry.second);
        nnew = std::partition(nodes.begin(), nodes.end(), [](uint32_t u) { return u & kNew; }) - nodes.begin();
        for (uint32_t& u : nodes) u &= kNumber;
    }

    void find_targets(int64_t first, int64_t last) {
        targets.clear();
        for (size_t i = 0; i < nodes.size(); i++)
            if (nodes[i] >= first && nodes[i] < last) targets.push_back((int64_t)i);
    }
};

template <class Kernel>
struct JoinScratch {
    JoinScratch() { Kernel::begin(); }
    ~JoinScratch() { Kernel::end(); }
    Neighbourhood now, next;
    std::vector<std::pair<uint32_t, uint32_t>> sampled;
    Buffer<char> rows, panel;
    std::vector<float> worst;
    alignas(64) float products[kTile * kTile];
    int64_t inserted = 0;
};

template <class Kernel>
void join(const Neighbourhood& set, const uint32_t* X, int64_t np, Inserter& inserter, JoinScratch<Kernel>& t) {
    const int64_t m = (int64_t)set.nodes.size(), bytes = Kernel::tile_bytes(np), stride = Kernel::Format::stride(np);
    const int64_t padded = (m + kTile - 1) / kTile * kTile;
    t.rows.reserve(padded / kTile * bytes);
    t.panel.reserve(bytes);
    t.worst.resize(padded);
    for (int64_t i = 0; i < m; i++) t.worst[i] = inserter.bound(set.nodes[i]);
    for (int64_t i = 0; i < set.nnew; i++)
        Kernel::row(X + (int64_t)set.nodes[i] * stride, np, t.rows.get() + i / kTile * bytes, (int)(i % kTile));
    const uint32_t* source[kTile];
    for (int64_t j = 0; j < m; j += kTile) {
        const int nc = (int)std::min<int64_t>(kTile, m - j);
        for (int c = 0; c < kTile; c++) source[c] = X + (int64_t)set.nodes[j + std::min(c, nc - 1)] * stride;
        Kernel::panel(source, np, t.panel.get());
        for (int64_t i = 0; i < set.nnew && i < j + kTile; i += kTile) {
            const int nr = (int)std::min<int64_t>(kTile, set.nnew - i);
            Kernel::tile(t.rows.get() + i / kTile * bytes, nr, t.panel.get(), np, t.products);
            for (int r = 0; r < nr; r++) {
                const float* s = t.products + r * kTile;
                // each pair once: columns after the row
                uint32_t columns = first_columns(nc);
                if (i + r >= j) columns &= i + r - j >= 31 ? 0u : ~0u << (i + r - j + 1);
                const uint32_t a = set.nodes[i + r];
                for (uint32_t better = tiles::above(s, t.worst[i + r]) & columns; better; better &= better - 1) {
                    const int c = __builtin_ctz(better);
                    t.inserted += inserter.offer(a, set.nodes[j + c], s[c]);
                }
                for (uint32_t better = tiles::above_each(s, t.worst.data() + j) & columns; better; better &= better - 1) {
                    const int c = __builtin_ctz(better);
                    t.inserted += inserter.offer(set.nodes[j + c], a, s[c]);
                }
            }
        }
    }
}

// The same for the lists of set.targets alone. These are what is packed in panels, as they are few.
template <class Kernel>
void join_targets(const Neighbourhood& set, const uint32_t* X, int64_t np, Inserter& inserter, JoinScratch<Kernel>& t) {
    const int64_t m = (int64_t)set.nodes.size(), bytes = Kernel::tile_bytes(np), stride = Kernel::Format::stride(np);
    const int64_t mt = (int64_t)set.targets.size(), padded = (mt + kTile - 1) / kTile * kTile;
    // those that are old are compared with new ones alone
    const int64_t mnew = std::lower_bound(set.targets.begin(), set.targets.end(), set.nnew) - set.targets.begin();
    t.rows.reserve(bytes);
    t.panel.reserve(padded / kTile * bytes);
    t.worst.assign(padded, std::numeric_limits<float>::infinity());
    for (int64_t j = 0; j < mt; j++) t.worst[j] = inserter.bound(set.nodes[set.targets[j]]);
    const uint32_t* source[kTile];
    for (int64_t j = 0; j < mt; j += kTile) {
        for (int64_t c = 0; c < kTile; c++)
            source[c] = X + (int64_t)set.nodes[set.targets[std::min(j + c, mt - 1)]] * stride;
        Kernel::panel(source, np, t.panel.get() + j / kTile * bytes);
    }
    for (int64_t i = 0; i < m; i += kTile) {
        const int64_t columns = i < set.nnew ? mt : mnew;
        if (!columns) break;
        const int nr = (int)std::min<int64_t>(kTile, m - i);
        for (int r = 0; r < nr; r++) Kernel::row(X + (int64_t)set.nodes[i + r] * stride, np, t.rows.get(), r);
        for (int64_t j = 0; j < columns; j += kTile) {
            Kernel::tile(t.rows.get(), nr, t.panel.get() + j / kTile * bytes, np, t.products);
            for (int r = 0; r < nr; r++) {
                const float* s = t.products + r * kTile;
                const uint32_t columns_of_row = first_columns((i + r < set.nnew ? mt : mnew) - j);
                for (uint32_t better = tiles::above_each(s, t.worst.data() + j) & columns_of_row; better; better &= better - 1) {
                    const int c = __builtin_ctz(better);
                    const int64_t target = set.targets[j + c];
                    if (target != i + r) t.inserted += inserter.offer(set.nodes[target], set.nodes[i + r], s[c]);
                }
            }
        }
    }
}

template <class Kernel>
int64_t join_range_with(int64_t n, const uint32_t* X, int64_t np, int64_t K, const int32_t* lists, const int64_t* offsets,
                        const int32_t* reverse, int64_t R, uint32_t seed, int64_t first, int64_t last, int64_t from_target,
                        int64_t to_target, uint64_t* keys, float* worst) {
    const int64_t stride = Kernel::Format::stride(np);
    const bool all = to_target - from_target == n;
    std::atomic<int64_t> inserted{0};
    Inserter inserter(K, keys, worst, from_target);
    parallel_blocks<JoinScratch<Kernel>>(last - first, 256, [&](int64_t i0, int64_t i1, JoinScratch<Kernel>& t) {
        t.inserted = 0;
        auto gather = [&](int64_t i, Neighbourhood& set) {
            set.gather(first + i, K, lists, reverse + offsets[i], reverse + offsets[i + 1], R, seed, t.sampled);
            if (!all) {
                set.find_targets(from_target, to_target);
                if (set.targets.empty()) set.nnew = 0;
            }
            if (set.nnew)
                for (const uint32_t u : set.nodes) {
                    const uint32_t* x = X + (int64_t)u * stride;
                    for (int64_t w = 0; w < stride; w += 16) __builtin_prefetch(x + w);
                    __builtin_prefetch(x + stride - 1);
                }
        };
        gather(i0, t.now);
        for (int64_t i = i0; i < i1; i++) {
            if (i + 1 < i1) gather(i + 1, t.next);      // its vectors arrive while this one is computed
            if (t.now.nnew && all) join(t.now, X, np, inserter, t);
            if (t.now.nnew && !all) join_targets(t.now, X, np, inserter, t);
            std::swap(t.now, t.next);
        }
        inserted += t.inserted;
    });
    return inserted;
}

// ---- exact products

float inner_product(const float* x, const float* y, int64_t d) {
    typedef float Vector __attribute__((vector_size(64), aligned(4)));
    Vector sums[2] = {};
    int64_t i = 0;
    for (; i + 32 <= d; i += 32)
        for (int v = 0; v < 2; v++) sums[v] += *(const Vector*)(x + i + 16 * v) * *(const Vector*)(y + i + 16 * v);
    sums[0] += sums[1];
    float s = 0;
    for (int c = 0; c < 16; c++) s += sums[0][c];
    for (; i < d; i++) s += x[i] * y[i];
    return s;
}

struct Vectors {
    int64_t d;
    const float* first;
    int64_t nfirst;
    const float* rest;
    const float* scale;
    const float* operator[](int64_t i) const { return i < nfirst ? first + i * d : rest + (i - nfirst) * d; }
    float factor(int64_t i) const { return scale ? scale[i] : 1.0f; }
};

}  // namespace

std::string products() { return chosen_products(); }

void use_products(const std::string& name) { chosen_products() = checked_products(name); }

namespace {

// What `call` returns for the kernel that multiplies vectors of so many bits an element.
template <class Call>
auto with_kernel(int bits, Call call) {
    [[maybe_unused]] const std::string& chosen = chosen_products();
#ifdef TILES_AMX
    if (chosen == "amx" && bits == 8) return call(tiles::AmxBytes());
    if (chosen == "amx" && bits == 16) return call(tiles::AmxBfloat16());
#endif
#ifdef TILES_VNNI
    if (chosen == "avx512" && bits == 8) return call(tiles::Avx512Bytes());
#endif
#ifdef TILES_BF16
    if (chosen == "avx512" && bits == 16) return call(tiles::Avx512Bfloat16());
#endif
#ifdef TILES_INT16
    if (chosen == "int16" && bits == 8) return call(tiles::Int16Bytes());
#endif
    if (bits == 8) return call(tiles::Float32<tiles::Bytes>());
    if (bits == 16) return call(tiles::Float32<tiles::Bfloat16>());
    return call(tiles::Float32<tiles::Single>());
}

}  // namespace

void to_bfloat16(int64_t n, int64_t d, const float* x, const float* scale, int64_t np, int32_t* out, float* residual) {
    check_width(np);
    if (d > 2 * np) throw std::invalid_argument("to_bfloat16: more elements than fit");
    parallel_blocks(n, 64, [&](int64_t i0, int64_t i1) {
        for (int64_t i = i0; i < i1; i++) {
            const float* row = x + i * d;
            uint16_t* o = (uint16_t*)(out + i * np);
            const float factor = scale ? scale[i] : 1.0f;
            float lost = 0;
            for (int64_t j = 0; j < d; j++) {
                const float value = row[j] * factor;
                uint32_t bits;
                std::memcpy(&bits, &value, 4);
                bits += 0x7fff + (bits >> 16 & 1);      // round to nearest, ties to even
                o[j] = (uint16_t)(bits >> 16);
                const float rest = value - tiles::Bfloat16::element(bits >> 16, 0);
                lost += rest * rest;
            }
            std::fill(o + d, o + 2 * np, (uint16_t)0);
            if (residual) residual[i] = std::sqrt(lost);
        }
    });
}

void to_bytes(int64_t n, int64_t d, const float* x, const float* scale, int64_t np, int32_t* out, float* residual) {
    check_width(np);
    if (d > 4 * np) throw std::invalid_argument("to_bytes: more elements than fit");
    parallel_blocks(n, 1024, [&](int64_t i0, int64_t i1) {
        for (int64_t i = i0; i < i1; i++) {
            const float* row = x + i * d;
            const float factor = scale ? scale[i] : 1.0f;
            float most = 0;
            for (int64_t j = 0; j < d; j++) most = std::max(most, std::fabs(row[j] * factor));
            const float step = most / 127;
            const float inverse = step >= std::numeric_limits<float>::min() ? 1 / step : 0;
            const float s = inverse ? step : 0;
            uint8_t* o = (uint8_t*)(out + i * tiles::Bytes::stride(np));
            float lost = 0;
            for (int64_t j = 0; j < d; j++) {
                // adding 1.5 2^23 rounds to a whole number, which then stands in the lowest bits
                const float value = row[j] * factor, rounded = value * inverse + (12582912.0f + 128.0f);
                uint32_t bits;
                std::memcpy(&bits, &rounded, 4);
                o[j] = (uint8_t)bits;
                const float rest = value - s * (rounded - (12582912.0f + 128.0f));
                lost += rest * rest;
            }
            std::fill(o + d, o + 4 * np, (uint8_t)128);
            std::memcpy(o + 4 * np, &s, 4);
            if (residual) residual[i] = std::sqrt(lost);
        }
    });
}

void search_all(int64_t nq, const int32_t* Q, int64_t nb, const int32_t* X, int64_t np, int bits, int64_t first,
                int64_t K, int64_t* keys, int64_t x_K, int64_t* x_keys, float* x_worst) {
    check_width(np);
    check_numbers(first + nb);
    if (K < 1 || (x_keys && x_K < 1)) throw std::invalid_argument("search_all: K is less than 1");
    if (x_keys && !x_worst) throw std::invalid_argument("search_all: x_worst is missing");
    if (first < 0) throw std::invalid_argument("search_all: the first number is less than 0");
    with_kernel(bits, [&](auto kernel) {
        return search_all_with<decltype(kernel)>(nq, (const uint32_t*)Q, nb, (const uint32_t*)X, np, first, K, keys, x_K,
                                                 (uint64_t*)x_keys, x_worst);
    });
}

void search_self(int64_t first, int64_t last, const int32_t* X, int64_t np, int bits, int64_t K, int64_t* keys) {
    check_width(np);
    check_numbers(last);
    if (K < 1 || first < 0 || first > last) throw std::invalid_argument("search_self: K is less than 1, or first out of range");
    with_kernel(bits, [&](auto kernel) {
        return search_self_with<decltype(kernel)>(first, last, (const uint32_t*)X, np, K, keys);
    });
}

namespace {

Near checked_near(int64_t nq, const int32_t* group, int64_t ngroup, const int64_t* offsets, const int32_t* listed, int64_t nb) {
    for (int64_t i = 0; i < nq; i++)
        if (group[i] < 0 || group[i] >= ngroup) throw std::invalid_argument("a query's group is out of range");
    for (int64_t g = 0; g < ngroup; g++)
        if (offsets[g] < 0 || offsets[g + 1] < offsets[g]) throw std::invalid_argument("offsets of listed vectors do not rise");
    for (int64_t e = ngroup ? offsets[0] : 0; ngroup && e < offsets[ngroup]; e++)
        if (listed[e] < 0 || listed[e] >= nb) throw std::invalid_argument("a listed vector is out of range");
    return Near{group, offsets, listed};
}

}  // namespace

void search_near(int64_t nq, const int32_t* Q, const int32_t* order, int64_t np, int bits, const int32_t* group,
                 int64_t ngroup, const int64_t* offsets, const int32_t* listed, int64_t nb, const int32_t* X, int64_t K,
                 int64_t* keys) {
    check_width(np);
    check_numbers(nb);
    if (K < 1) throw std::invalid_argument("search_near: K is less than 1");
    const Near near = checked_near(nq, group, ngroup, offsets, listed, nb);
    with_kernel(bits, [&](auto kernel) {
        return search_near_with<decltype(kernel)>(nq, (const uint32_t*)Q, order, np, near, (const uint32_t*)X, K, keys);
    });
}

void search_cells(int64_t nq, const int32_t* Q, int64_t np, int bits, int64_t nlist, const int32_t* centroids,
                  const int32_t* own, const int64_t* offsets, const int32_t* listed, int64_t nprobe, const int32_t* own_before,
                  const int64_t* offsets_before, const int32_t* listed_before, int64_t before, const int64_t* begin,
                  const int64_t* end, const int32_t* X, int64_t K, int64_t* keys, const int64_t* middle,
                  const int32_t* numbers, int64_t* x_keys, float* x_worst) {
    check_width(np);
    check_numbers(nlist);
    if (K < 1 || nprobe < 1 || nlist < 1)
        throw std::invalid_argument("search_cells: K, nprobe or the number of cells is less than 1");
    if (before < 0 || (before && x_keys)) throw std::invalid_argument("search_cells: `before` is negative, or beside x_keys");
    if (x_keys && !(middle && numbers && x_worst)) throw std::invalid_argument("search_cells: an array is missing");
    const Near near = own ? checked_near(nq, own, nlist, offsets, listed, nlist) : Near{};
    const Near near_before =
        own_before ? checked_near(nq, own_before, nlist, offsets_before, listed_before, nlist) : Near{};
    with_kernel(bits, [&](auto kernel) {
        return search_cells_with<decltype(kernel)>(
            nq, (const uint32_t*)Q, np, nlist, (const uint32_t*)centroids, near, std::min(nprobe, nlist), near_before,
            std::min(before, nlist), begin, end, (const uint32_t*)X, K, keys, middle, numbers, (uint64_t*)x_keys, x_worst);
    });
}

void group_sums(int64_t n, int64_t d, const float* x, int64_t m, const int32_t* order, int64_t ngroup, const int64_t* end,
                float* out) {
    for (int64_t i = 0; i < m; i++)
        if (order[i] < 0 || order[i] >= n) throw std::invalid_argument("group_sums: a row is out of range");
    for (int64_t g = 0; g < ngroup; g++)
        if (end[g] < (g ? end[g - 1] : 0) || end[g] > m) throw std::invalid_argument("group_sums: ends of groups do not rise");
    parallel_blocks(ngroup, 16, [&](int64_t g0, int64_t g1) {
        std::fill(out + g0 * d, out + g1 * d, 0.0f);
        for (int64_t g = g0; g < g1; g++)
            for (int64_t i = g ? end[g - 1] : 0; i < end[g]; i++) {
                if (i + 4 < m)
                    for (int64_t j = 0; j < d; j += 16) __builtin_prefetch(x + order[i + 4] * d + j);
                const float* row = x + order[i] * d;
                for (int64_t j = 0; j < d; j++) out[g * d + j] += row[j];
            }
    });
}

void known_lists(int64_t n, const int32_t* X, int64_t np, int bits, const int32_t* order, const int32_t* position,
                 int64_t n0, int64_t k, const int32_t* I, float margin, int64_t K, int64_t* keys) {
    check_width(np);
    check_numbers(n);
    if (n0 > n || k > K || k < 1) throw std::invalid_argument("known_lists: more known lists than nodes, or longer than K");
    for (int64_t e = 0; e < n0 * k; e++)
        if (I[e] >= n) throw std::invalid_argument("known_lists: a neighbour is out of range");
    with_kernel(bits, [&](auto kernel) {
        return known_lists_with<decltype(kernel)>(n, (const uint32_t*)X, np, order, position, n0, k, I, margin, K,
                                                  (uint64_t*)keys);
    });
}

void start_round(int64_t n, int64_t K, int64_t* keys, int32_t* lists, float* worst) {
    check_numbers(n);
    if (K < 1) throw std::invalid_argument("start_round: K is less than 1");
    parallel_blocks(n, 4096, [&](int64_t i0, int64_t i1) {
        for (int64_t i = i0; i < i1; i++) {
            uint64_t* list = (uint64_t*)keys + i * K;
            std::sort(list, list + K, std::greater<uint64_t>());
            for (int64_t j = 0; j < K; j++) {
                lists[i * K + j] = names_none(list[j]) ? -1 : (int32_t)(number_of(list[j]) | (list[j] & kNewKey ? kNew : 0));
                list[j] &= ~kNewKey;
            }
            worst[i] = product_of(list[K - 1]);
        }
    });
}

int64_t reverse_offsets(int64_t n, int64_t K, const int32_t* lists, int64_t* offsets) {
    std::fill(offsets, offsets + n + 1, (int64_t)0);
    std::atomic<bool> wrong{false};
#pragma omp parallel for schedule(static)
    for (int64_t e = 0; e < n * K; e++) {
        if (lists[e] == -1) continue;
        const int64_t u = lists[e] & kNumber;
        if (u >= n) {
            wrong = true;
            continue;
        }
        __atomic_fetch_add(offsets + u + 1, (int64_t)1, __ATOMIC_RELAXED);
    }
    if (wrong) throw std::invalid_argument("reverse_offsets: a neighbour is out of range");
    for (int64_t i = 0; i < n; i++) offsets[i + 1] += offsets[i];
    return offsets[n];
}

void reverse_lists(int64_t n, int64_t K, const int32_t* lists, int64_t first, int64_t last, const int64_t* offsets,
                   int32_t* reverse) {
    if (first < 0 || first > last || last > n) throw std::invalid_argument("reverse_lists: nodes out of range");
    std::vector<int32_t> filled(last - first, 0);
    // neighbours have numbers near each other: what there is to do for a range is all with some of the nodes
#pragma omp parallel for schedule(dynamic, 16384)
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < K; j++) {
            const int32_t entry = lists[i * K + j];
            if (entry == -1) continue;
            const int64_t u = entry & kNumber;
            if (u < first || u >= last) continue;
            const int32_t at = __atomic_fetch_add(filled.data() + (u - first), 1, __ATOMIC_RELAXED);
            reverse[offsets[u - first] - offsets[0] + at] = (int32_t)((uint32_t)i | ((uint32_t)entry & kNew));
        }
}

int64_t join_range(int64_t n, const int32_t* X, int64_t np, int bits, int64_t K, const int32_t* lists, const int64_t* offsets,
                   const int32_t* reverse, int64_t R, int64_t seed, int64_t first, int64_t last, int64_t from_target,
                   int64_t to_target, int64_t* keys, float* worst) {
    check_width(np);
    if (first < 0 || last > n || from_target < 0 || to_target > n || R < 0)
        throw std::invalid_argument("join_range: nodes out of range, or R is less than 0");
    return with_kernel(bits, [&](auto kernel) {
        return join_range_with<decltype(kernel)>(n, (const uint32_t*)X, np, K, lists, offsets, reverse, R, (uint32_t)seed,
                                                 first, last, from_target, to_target, (uint64_t*)keys, worst);
    });
}

namespace {

typedef std::vector<std::pair<float, int32_t>> List;     // products and numbers

// Products of a list's entries that row q of D, I holds, taken from there; these entries come first. Returns how many.
size_t look_up(List& list, int64_t q, int64_t k, const float* D, const int32_t* I) {
    size_t done = 0;
    for (auto& entry : list) {
        const int32_t *row = I + q * k, *at = std::find(row, row + k, entry.second);
        if (at == row + k) continue;
        entry.first = D[at - I];
        std::swap(entry, list[done++]);
    }
    return done;
}

// Row `row` of D, I: the k best of a list, none twice. self: the number of the node itself, which is in the list, or -1.
void write_best(List& list, int64_t self, int64_t row, int64_t k, float* D, int32_t* I) {
    // among equals the node itself comes first, then the lower number
    auto better = [&](const std::pair<float, int32_t>& a, const std::pair<float, int32_t>& b) {
        if (a.first != b.first) return a.first > b.first;
        if (a.second == self || b.second == self) return a.second == self && b.second != self;
        return a.second < b.second;
    };
    std::sort(list.begin(), list.end(), better);
    // a list may name a neighbour twice, if the process that made it was killed
    const auto same = [](auto& a, auto& b) { return a.second == b.second; };
    list.erase(std::unique(list.begin(), list.end(), same), list.end());
    if (self >= 0) {
        // rounding, or a smaller norm, may have put it behind others
        const auto at = std::find_if(list.begin(), list.end(), [&](auto& entry) { return entry.second == self; });
        if (at->first >= list[0].first - 1e-6f * std::fabs(list[0].first))
            std::rotate(list.begin(), at, at + 1);
        else if (at - list.begin() >= k)
            list[k - 1] = *at;
    }
    for (int64_t j = 0; j < k; j++) {
        const bool have = j < (int64_t)list.size();
        D[row * k + j] = have ? list[j].first : kNone;
        I[row * k + j] = have ? list[j].second : -1;
    }
}

}  // namespace

void exact_products(int64_t nq, int64_t K, const int64_t* keys, const int32_t* q_number, const int32_t* x_number,
                    int64_t nnumber, int64_t d, const float* Q0, int64_t nQ0, const float* Q1, int64_t nQ, const float* q_scale,
                    const float* X0, int64_t nX0, const float* X1, int64_t nX, const float* x_scale, int same, int64_t k,
                    int64_t known, float* D, int32_t* I) {
    if (k < 1) throw std::invalid_argument("exact_products: k is less than 1");
    const Vectors Q{d, Q0, nQ0, Q1, q_scale}, X{d, X0, nX0, X1, x_scale};
    parallel_blocks<List>(nq, 16, [&](int64_t i0, int64_t i1, List& list) {
        for (int64_t i = i0; i < i1; i++) {
            const int64_t q = q_number ? q_number[i] : i;
            if (q < 0 || q >= nQ) throw std::invalid_argument("exact_products: there is no query " + std::to_string(q));
            const float* x = Q[q];
            list.clear();
            bool has_self = !same;
            for (int64_t j = 0; j < K; j++) {
                const uint64_t key = (uint64_t)keys[i * K + j];
                if (names_none(key)) continue;
                const int64_t at = number_of(key), number = x_number && at < nnumber ? x_number[at] : at;
                if (at >= nnumber || number < 0 || number >= nX)
                    throw std::invalid_argument("exact_products: a list is damaged, no vector is " + std::to_string(number));
                has_self |= number == q;
                list.emplace_back(0.0f, (int32_t)number);
            }
            if (!has_self) list.emplace_back(0.0f, (int32_t)q);
            const size_t done = q < known ? look_up(list, q, k, D, I) : 0, ahead = 4;
            for (size_t j = done; j < list.size() + ahead; j++) {
                if (j < list.size()) {
                    const float* y = X[list[j].second];
                    for (int64_t w = 0; w < d; w += 16) __builtin_prefetch(y + w);
                }
                if (j >= done + ahead) {
                    auto& entry = list[j - ahead];
                    entry.first = inner_product(x, X[entry.second], d) * (Q.factor(q) * X.factor(entry.second));
                }
            }
            write_best(list, same ? q : -1, q, k, D, I);
        }
    });
}

void products_in_part(int64_t nq, int64_t K, const int32_t* numbers, int64_t d, const float* Q, const float* q_scale,
                      int64_t first, int64_t nX, const float* X, const float* x_scale, float* products) {
    parallel_blocks(nq, 256, [&](int64_t i0, int64_t i1) {
        for (int64_t i = i0; i < i1; i++)
            for (int64_t e = i * K; e < (i + 1) * K; e++) {
                const int64_t x = numbers[e] - first;
                if (x < 0 || x >= nX) continue;
                const float factor = (q_scale ? q_scale[i] : 1.0f) * (x_scale ? x_scale[x] : 1.0f);
                products[e] = inner_product(Q + i * d, X + x * d, d) * factor;
            }
    });
}

void best_by_products(int64_t nq, int64_t K, const int32_t* numbers, const float* products, int64_t first, int64_t known,
                      int64_t k, float* D, int32_t* I) {
    if (k < 1) throw std::invalid_argument("best_by_products: k is less than 1");
    parallel_blocks<List>(nq, 256, [&](int64_t i0, int64_t i1, List& list) {
        for (int64_t i = i0; i < i1; i++) {
            list.clear();
            bool has_self = false;
            for (int64_t e = i * K; e < (i + 1) * K; e++)
                if (numbers[e] >= 0) {
                    list.emplace_back(products[e], numbers[e]);
                    has_self |= numbers[e] == first + i;
                }
            if (!has_self) throw std::invalid_argument("best_by_products: a list is without the node itself");
            if (i < known) look_up(list, i, k, D, I);
            write_best(list, first + i, i, k, D, I);
        }
    });
}

void read_rows(int file, int64_t nrow, int64_t n, const int64_t* rows, int64_t d, float* out) {
    const int64_t bytes = 4 * d;
    parallel_blocks(n, 64, [&](int64_t i0, int64_t i1) {
        for (int64_t i = i0; i < i1; i++) {
            if (rows[i] < 0 || rows[i] >= nrow) continue;
            read_at(file, out + i * d, bytes, rows[i] * bytes, [&] { return "row " + std::to_string(rows[i]); });
        }
    });
}

void merge_lists(int64_t n, int64_t k1, const float* D1, const int32_t* I1, int64_t k2, const float* D2,
                 const int32_t* I2, const int32_t* own, int64_t k, float* D, int32_t* I) {
    parallel_blocks(n, 4096, [&](int64_t i0, int64_t i1) {
        for (int64_t i = i0; i < i1; i++) {
            const float *a = D1 + i * k1, *b = D2 + i * k2;
            const int32_t *u = I1 + i * k1, *v = I2 + i * k2;
            const bool begins_with_own = own && k1 && u[0] == own[i];
            int64_t p = 0, q = 0;
            for (int64_t j = 0; j < k; j++) {
                const bool left = p < k1 && u[p] >= 0, right = q < k2 && v[q] >= 0;
                if (left && (!right || a[p] >= b[q] || (begins_with_own && !p))) {
                    D[i * k + j] = a[p];
                    I[i * k + j] = u[p++];
                } else if (right) {
                    D[i * k + j] = b[q];
                    I[i * k + j] = v[q++];
                } else {
                    D[i * k + j] = kNone;
                    I[i * k + j] = -1;
                }
            }
        }
    });
}
