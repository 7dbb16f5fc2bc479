#include "sparse_dense.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <string>
#include <vector>

#include "entries.h"
#include "parallel.h"

#ifdef GRAPH_UTILS_MKL
#include <mkl_service.h>
#include <mkl_spblas.h>
#endif

namespace {

constexpr int64_t kBlock = 1024;    // rows that are added up before their sums are

// Sixteen floats: one AVX-512 register, two AVX ones or four SSE ones, as the machine has it.
typedef float Vector __attribute__((vector_size(64)));

// How many cache lines of L are fetched ahead, as measured: with too few the memory waits, too many push out each other.
// Where all neighbours have near numbers it is enough to fetch the rows in turn, once each, kAheadBytes before the one that
// is computed.
constexpr int64_t kAheadLines = 384, kAheadBytes = 1 << 18;
constexpr int64_t kNearBytes = 1 << 19;     // with what is nearer an L2 cache of 1 MB can cope
constexpr int64_t kShortestRun = 4, kLongestRun = 32;   // blocks that a thread takes at a time: from how many on this pays
constexpr int64_t kGap = 1024;      // entries of a file that are read for nothing rather than to read twice

// Into the L2 cache: it can wait for more lines at a time than L1, where so many would push out what is in use.
// always_inline: GCC takes functions that only prefetch for functions without effect, and leaves their calls out.
template <int NV>
__attribute__((always_inline)) inline void prefetch_row(const Vector* row) {
    for (int v = 0; v < NV; v++) __builtin_prefetch(row + v, 0, 2);
}

constexpr int64_t kLong = 1024;     // most neighbours whose rows are added up in float

template <int NV>
struct Row {
    Vector parts[NV];
};

// The sum of many rows of L. Where a million images are the same, as black ones for want of others, all have the same
// neighbours, and these a million: in float such sums would be off by a hundredth.
template <int NV>
__attribute__((noinline)) Row<NV> sum_of_many(const int32_t* indices, int64_t begin, int64_t end, const Vector* L) {
    typedef double Wide __attribute__((vector_size(128)));
    Wide total[NV] = {};
    for (int64_t e = begin; e < end;) {
        Vector sums[NV] = {};
        for (const int64_t stop = std::min(end, e + kLong / 4); e < stop; e++)
            for (int v = 0; v < NV; v++) sums[v] += L[(int64_t)indices[e] * NV + v];
        for (int v = 0; v < NV; v++) total[v] += __builtin_convertvector(sums[v], Wide);
    }
    Row<NV> out;
    for (int v = 0; v < NV; v++) out.parts[v] = __builtin_convertvector(total[v], Vector);
    return out;
}

// Whether of rows i0 .. i1 all but a few have no neighbour farther than `distance` from their own numbers, by a sample.
bool all_near(const int64_t* indptr, const int32_t* indices, const int32_t* nsingle, int64_t i0, int64_t i1, int64_t distance) {
    int64_t far = 0, seen = 0;
    for (int64_t i = i0; i < i1; i += 16) {
        const int64_t begin = indptr[i], end = indptr[i + 1], middle = begin + nsingle[i];
        if (begin == end) continue;
        // both lists are in order
        const int64_t first = std::min(indices[begin], indices[middle < end ? middle : begin]);
        const int64_t last = std::max(indices[end - 1], indices[middle > begin ? middle - 1 : end - 1]);
        far += first < i - distance || last > i + distance;
        seen++;
    }
    return 8 * far <= seen;
}

// Columns are NV vectors wide, so that the accumulators of a row live in registers. Sums over rows are kept in float for
// a few rows only. in_turn: fetch the rows in turn, not each neighbour. nnz: where the entries that are there end. weights: null,
// or n factors of the rows in the sums.
template <int NV, bool in_turn>
void product_rows(int64_t n, const int64_t* indptr, const int32_t* indices, const int32_t* nsingle, const Vector* L,
                  const Vector* scale, int64_t nnz, const int32_t* rows, int64_t i0, int64_t i1, Vector* out,
                  const float* weights, double* colsum) {
    Vector sums[NV] = {};
    for (int64_t r = i0; r < i1; r++) {
        const int64_t i = rows ? rows[r] : r;
        const int64_t begin = indptr[i], end = indptr[i + 1], middle = begin + nsingle[i];
        Vector one[NV] = {}, two[NV] = {};
        // fetching runs on into the next row that is computed here
        const int64_t next = r + 1 < i1 ? indptr[rows ? rows[r + 1] : r + 1] - end : 0;
        if (in_turn) prefetch_row<NV>(L + std::min<int64_t>(i + kAheadBytes / (NV * (int64_t)sizeof(Vector)), n - 1) * NV);
        auto fetch = [&](int64_t e) __attribute__((always_inline)) {
            if (in_turn) return;
            const int64_t ahead = e + kAheadLines / NV;
            prefetch_row<NV>(L + (int64_t)indices[std::min(ahead < end ? ahead : ahead + next, nnz - 1)] * NV);
        };
        int64_t e = begin;
        if (end - begin > kLong) {
            const Row<NV> single = sum_of_many<NV>(indices, begin, middle, L), twice = sum_of_many<NV>(indices, middle, end, L);
            for (int v = 0; v < NV; v++) {
                one[v] = single.parts[v];
                two[v] = twice.parts[v];
            }
            e = end;
        }
        for (; e < middle; e++) {
            fetch(e);
            const Vector* row = L + (int64_t)indices[e] * NV;
            for (int v = 0; v < NV; v++) one[v] += row[v];
        }
        for (; e < end; e++) {
            fetch(e);
            const Vector* row = L + (int64_t)indices[e] * NV;
            for (int v = 0; v < NV; v++) two[v] += row[v];
        }
        const int64_t weight = (middle - begin) + 2 * (end - middle);
        const float factor = weight ? 1.0f / weight : 0.0f;
        for (int v = 0; v < NV; v++) {
            const Vector x = (one[v] + two[v] + two[v]) * factor * scale[v];
            out[i * NV + v] = x;
            if (weights)
                sums[v] += x * weights[i];
            else
                sums[v] += x;
        }
        if ((r - i0) % 64 == 63 || r == i1 - 1)
            for (int v = 0; v < NV; v++) {
                for (int c = 0; c < 16; c++) colsum[v * 16 + c] += sums[v][c];
                sums[v] = Vector{};
            }
    }
}

}  // namespace

bool has_mkl() {
#ifdef GRAPH_UTILS_MKL
    return true;
#else
    return false;
#endif
}

int get_num_threads() { return omp_get_max_threads(); }

void set_num_threads(int n) {
    if (n < 1) throw std::invalid_argument("the number of threads must be at least 1");
    omp_set_num_threads(n);
}

namespace {

// No early exit: compilers make vector comparisons of it, and nothing depends on a branch that cannot be foretold.
inline bool contains(const int32_t* row, int64_t k, int32_t t) {
    int32_t hit = 0;
    for (int64_t j = 0; j < k; j++) hit |= row[j] == t;
    return hit;
}

std::vector<int32_t> inverse(int64_t n, const int32_t* rank) {
    std::vector<int32_t> order(rank ? n : 0);
    for (int64_t i = 0; i < (int64_t)order.size(); i++) order[rank[i]] = (int32_t)i;
    return order;
}

}  // namespace

int64_t symmetrise_count(int64_t n, int64_t k, int64_t stride, const int32_t* I, const int32_t* rank, int64_t* indptr,
                         uint8_t* mutual) {
    // degree = own edges + edges from others - edges that both have
    std::vector<std::atomic<int32_t>> degree(n);
    const std::vector<int32_t> order = inverse(n, rank);
    const int64_t nbyte = (k + 7) / 8;
    // in the order of the new numbers, as the rows of a node's neighbours were then looked at not long ago
    parallel_blocks(n, kBlock, [&](int64_t r0, int64_t r1) {
        for (int64_t r = r0; r < r1; r++) {
            if (r + 8 < r1) {
                const int32_t* later = I + (int64_t)(rank ? order[r + 8] : r + 8) * stride;
                for (int64_t j = 0; j < k; j += 16) __builtin_prefetch(later + j);
            }
            if (r + 2 < r1) {
                const int32_t* later = I + (int64_t)(rank ? order[r + 2] : r + 2) * stride;
                for (int64_t j = 0; j < k; j++)
                    if (later[j] >= 0 && later[j] < n)
                        for (int64_t l = 0; l < k; l += 16) __builtin_prefetch(I + (int64_t)later[j] * stride + l);
            }
            const int32_t i = rank ? order[r] : (int32_t)r;
            const int32_t* row = I + (int64_t)i * stride;
            uint8_t* bits = mutual + i * nbyte;
            std::fill(bits, bits + nbyte, 0);
            int32_t own = 0;
            for (int64_t j = 0; j < k; j++) {
                const int32_t t = row[j];
                if (t < 0) continue;
                if (t >= n)
                    throw std::invalid_argument("node " + std::to_string(i) + " has neighbour " + std::to_string(t) +
                                                " of " + std::to_string(n) + " nodes");
                if (contains(row, j, t))
                    throw std::invalid_argument("node " + std::to_string(i) + " lists neighbour " + std::to_string(t) +
                                                " twice");
                own++;
                if (contains(I + (int64_t)t * stride, k, i))
                    bits[j / 8] |= 1 << j % 8;      // mutual, or i itself: t counts it for its own row
                else
                    degree[rank ? rank[t] : t].fetch_add(1, std::memory_order_relaxed);
            }
            degree[r].fetch_add(own, std::memory_order_relaxed);
        }
    });
    indptr[0] = 0;
    for (int64_t i = 0; i < n; i++) indptr[i + 1] = indptr[i] + degree[i];
    return indptr[n];
}

void symmetrise_fill(int64_t n, int64_t k, int64_t stride, const int32_t* I, const int32_t* rank, const int64_t* indptr,
                     const uint8_t* mutual, int32_t* indices, int32_t* nsingle) {
    // singles grow from the front of a row, mutual neighbours from its end
    std::vector<std::atomic<int32_t>> front(n);
    const std::vector<int32_t> order = inverse(n, rank);
    const int64_t nbyte = (k + 7) / 8;
    parallel_blocks(n, kBlock, [&](int64_t r0, int64_t r1) {
        for (int64_t r = r0; r < r1; r++) {
            if (r + 8 < r1) {
                const int64_t later = rank ? order[r + 8] : r + 8;
                for (int64_t j = 0; j < k; j += 16) __builtin_prefetch(I + later * stride + j);
                __builtin_prefetch(mutual + later * nbyte);
            }
            const int64_t i = rank ? order[r] : r;
            const int32_t* row = I + i * stride;
            int64_t back_end = indptr[r + 1];
            for (int64_t j = 0; j < k; j++) {
                const int32_t t = row[j];
                if (t < 0) continue;
                const int32_t rt = rank ? rank[t] : t;
                if (mutual[i * nbyte + j / 8] >> j % 8 & 1) {
                    indices[--back_end] = rt;
                } else {
                    indices[indptr[r] + front[r].fetch_add(1, std::memory_order_relaxed)] = rt;
                    indices[indptr[rt] + front[rt].fetch_add(1, std::memory_order_relaxed)] = (int32_t)r;
                }
            }
        }
    });
    parallel_blocks(n, kBlock, [&](int64_t i0, int64_t i1) {
        for (int64_t i = i0; i < i1; i++) {
            nsingle[i] = front[i];
            std::sort(indices + indptr[i], indices + indptr[i] + nsingle[i]);
            std::sort(indices + indptr[i] + nsingle[i], indices + indptr[i + 1]);
        }
    });
}

namespace {

// Changed rows of a graph, asked for every row from `first` on in turn.
class ChangedRows {
  public:
    ChangedRows(int64_t n0, const int64_t* indptr, const int32_t* indices, const int32_t* nsingle, int64_t nchange,
                const int32_t* row, const int32_t* column, const int8_t* by, int64_t first)
        : n0_(n0), nchange_(nchange), indptr_(indptr), indices_(indices), nsingle_(nsingle), row_(row), column_(column),
          by_(by), at_(std::lower_bound(row, row + nchange, first) - row) {}

    // Whether row i changes; then `once` and `twice` are its neighbours of either multiplicity.
    bool next(int64_t i) {
        const int64_t begin = at_;
        while (at_ < nchange_ && row_[at_] == i) at_++;
        if (at_ == begin) return false;
        const int32_t* const list = i < n0_ ? indices_ + indptr_[i] : nullptr;
        const int64_t nonce = i < n0_ ? nsingle_[i] : 0, degree = i < n0_ ? indptr_[i + 1] - indptr_[i] : 0;
        const int32_t *change = column_ + begin, *end = column_ + at_;
        once.clear();
        twice.clear();
        std::set_difference(list, list + nonce, change, end, std::back_inserter(once));
        std::set_difference(list + nonce, list + degree, change, end, std::back_inserter(twice));
        for (int64_t e = begin; e < at_; e++) {
            const int multiplicity = by_[e] + std::binary_search(list, list + nonce, column_[e])
                + 2 * std::binary_search(list + nonce, list + degree, column_[e]);
            if (multiplicity < 0 || multiplicity > 2)
                throw std::invalid_argument("entry " + std::to_string(i) + ", " + std::to_string(column_[e]) +
                                            " of the graph would be " + std::to_string(multiplicity));
            if (multiplicity) (multiplicity == 1 ? once : twice).push_back(column_[e]);
        }
        std::sort(once.begin(), once.end());
        std::sort(twice.begin(), twice.end());
        return true;
    }

    std::vector<int32_t> once, twice;

  private:
    int64_t n0_, nchange_;
    const int64_t* indptr_;
    const int32_t *indices_, *nsingle_, *row_, *column_;
    const int8_t* by_;
    int64_t at_;
};

}  // namespace

void change_count(int64_t n0, const int64_t* indptr, int64_t nnz, const int32_t* indices, const int32_t* nsingle, int64_t n,
                  int64_t nchange, const int32_t* row, const int32_t* column, const int8_t* by, int64_t* new_indptr,
                  int32_t* new_nsingle) {
    for (int64_t e = 0; e < nchange; e++) {
        if (row[e] < 0 || row[e] >= n || column[e] < 0 || column[e] >= n)
            throw std::invalid_argument("a changed entry is out of range");
        if (e && (row[e] < row[e - 1] || (row[e] == row[e - 1] && column[e] <= column[e - 1])))
            throw std::invalid_argument("changed entries are not in increasing order");
    }
    if (n < n0 || indptr[0] != 0 || indptr[n0] != nnz) throw std::invalid_argument("the graph's offsets are damaged");
    parallel_blocks(n, kBlock, [&](int64_t i0, int64_t i1) {
        for (int64_t i = i0; i < std::min(i1, n0); i++)
            if (indptr[i] < 0 || indptr[i + 1] < indptr[i] || indptr[i + 1] > nnz || nsingle[i] < 0 ||
                nsingle[i] > indptr[i + 1] - indptr[i])
                throw std::invalid_argument("the graph's offsets are damaged");
        ChangedRows changed(n0, indptr, indices, nsingle, nchange, row, column, by, i0);
        for (int64_t i = i0; i < i1; i++)
            if (changed.next(i)) {
                new_nsingle[i] = (int32_t)changed.once.size();
                new_indptr[i + 1] = (int64_t)(changed.once.size() + changed.twice.size());
            } else {
                new_nsingle[i] = i < n0 ? nsingle[i] : 0;
                new_indptr[i + 1] = i < n0 ? indptr[i + 1] - indptr[i] : 0;
            }
    });
    new_indptr[0] = 0;
    for (int64_t i = 0; i < n; i++) new_indptr[i + 1] += new_indptr[i];
}

namespace {

// Whether these numbers are in increasing order, from 0 to n - 1.
bool valid(const int32_t* begin, const int32_t* end, int64_t n) {
    if (begin == end) return true;
    bool rises = true;
    for (const int32_t* at = begin + 1; at < end; at++) rises &= at[-1] < at[0];
    return rises && *begin >= 0 && end[-1] < n;
}

}  // namespace

void change_fill(int64_t n0, const int64_t* indptr, const int32_t* indices, const int32_t* nsingle, int64_t n, int64_t nchange,
                 const int32_t* row, const int32_t* column, const int8_t* by, const int64_t* new_indptr,
                 const int32_t* new_nsingle, int32_t* new_indices) {
    parallel_blocks(n, kBlock, [&](int64_t i0, int64_t i1) {
        ChangedRows changed(n0, indptr, indices, nsingle, nchange, row, column, by, i0);
        for (int64_t i = i0; i < i1; i++) {
            int32_t* out = new_indices + new_indptr[i];
            if (changed.next(i)) {
                if ((int64_t)changed.once.size() != new_nsingle[i] ||
                    (int64_t)(changed.once.size() + changed.twice.size()) != new_indptr[i + 1] - new_indptr[i])
                    throw std::invalid_argument("the changes are others than were counted");
                std::copy(changed.once.begin(), changed.once.end(), out);
                std::copy(changed.twice.begin(), changed.twice.end(), out + new_nsingle[i]);
            } else if (i < n0) {
                std::copy(indices + indptr[i], indices + indptr[i + 1], out);
            }
            const int32_t *middle = out + new_nsingle[i], *end = new_indices + new_indptr[i + 1];
            if (!valid(out, middle, n) || !valid(middle, end, n))
                throw std::invalid_argument("neighbours in the graph are out of range or not in increasing order");
        }
    });
}

void product(int64_t n, const int64_t* indptr, const int32_t* indices, int file, const int32_t* nsingle, int64_t ncol,
             const float* L, const float* scale, int64_t nrow, const int32_t* rows, const float* weights, float* out,
             double* colsum) {
    if (ncol < 16 || ncol > 64 || ncol % 16) throw std::invalid_argument("ncol must be 16, 32, 48 or 64");
    if (n && (reinterpret_cast<uintptr_t>(L) | reinterpret_cast<uintptr_t>(out)) % 64)
        throw std::invalid_argument("L and out must be aligned to 64 bytes");
    const Entries entries(indices, file);
    const int64_t NV = ncol / 16;
    alignas(64) float factors[64];
    for (int64_t c = 0; c < ncol; c++) factors[c] = scale ? scale[c] : 1.0f;
    const int64_t count = rows ? nrow : n;
    const int64_t nblock = (count + kBlock - 1) / kBlock;
    // sums per block of rows, added in the order of the blocks: the same for any number of threads
    std::vector<double> partial(nblock * ncol);
    decltype(&product_rows<1, false>) each[] = {product_rows<1, false>, product_rows<2, false>, product_rows<3, false>,
                                                product_rows<4, false>},
                                      in_turn[] = {product_rows<1, true>, product_rows<2, true>, product_rows<3, true>,
                                                   product_rows<4, true>};
    const int64_t distance = kNearBytes / (ncol * (int64_t)sizeof(float));
    // a thread takes many blocks that follow each other, so that what it fetches ahead is for itself
    const int64_t run = std::clamp<int64_t>(nblock / (8 * omp_get_max_threads()), 1, kLongestRun);
    auto begin = [&](int64_t r) { return indptr[rows ? rows[r] : r]; };
    auto end = [&](int64_t r) { return indptr[(rows ? rows[r] : r) + 1]; };
    // rows from i on that are computed together: of a block, and as far as they follow each other in a file
    auto stop = [&](int64_t i, int64_t r1) {
        const int64_t most = std::min(r1, (i / kBlock + 1) * kBlock);
        if (!entries.in_file() || !rows) return most;
        for (i++; i < most && begin(i) >= end(i - 1) && begin(i) - end(i - 1) <= kGap;) i++;
        return i;
    };
    parallel_blocks<std::vector<int32_t>>(count, run * kBlock, [&](int64_t r0, int64_t r1, std::vector<int32_t>& buffer) {
        for (int64_t i0 = r0, i1; i0 < r1; i0 = i1) {
            i1 = stop(i0, r1);
            const int32_t* const some = entries.get(begin(i0), end(i1 - 1), buffer);
            const bool near = !rows && run >= kShortestRun && all_near(indptr, some, nsingle, i0, i1, distance);
            const auto kernel = (near ? in_turn : each)[NV - 1];
            kernel(n, indptr, some, nsingle, reinterpret_cast<const Vector*>(L), reinterpret_cast<const Vector*>(factors),
                   entries.in_file() ? end(i1 - 1) : indptr[n], rows, i0, i1, reinterpret_cast<Vector*>(out), weights,
                   partial.data() + i0 / kBlock * ncol);
        }
    });
    std::fill(colsum, colsum + ncol, 0.0);
    for (int64_t b = 0; b < nblock; b++)
        for (int64_t c = 0; c < ncol; c++) colsum[c] += partial[b * ncol + c];
}

void mass(int64_t n, const int64_t* indptr, const int32_t* indices, int file, const int32_t* nsingle, float* out) {
    const Entries entries(indices, file);
    auto row_sum = [&](int64_t i) { return 2 * (indptr[i + 1] - indptr[i]) - nsingle[i]; };
    parallel_blocks<std::vector<int32_t>>(n, kBlock, [&](int64_t i0, int64_t i1, std::vector<int32_t>& buffer) {
        const int32_t* const some = entries.get(indptr[i0], indptr[i1], buffer);
        for (int64_t i = i0; i < i1; i++) {
            double sum = 0;
            const int64_t middle = indptr[i] + nsingle[i];
            for (int64_t e = indptr[i]; e < indptr[i + 1]; e++) sum += (e < middle ? 1.0 : 2.0) / row_sum(some[e]);
            out[i] = (float)sum;
        }
    });
}

int64_t reach(const int64_t* indptr, const int32_t* indices, int file, int64_t nrow, const int32_t* rows, uint8_t* reached,
              int64_t most, int32_t* found) {
    const Entries entries(indices, file);
    std::vector<int32_t> buffer;
    int64_t count = 0;
    for (int64_t r = 0; r < nrow; r++) {
        const int64_t begin = indptr[rows[r]], end = indptr[rows[r] + 1];
        const int32_t* const some = entries.get(begin, end, buffer);
        for (int64_t e = begin; e < end; e++) {
            const int32_t j = some[e];
            if (reached[j]) continue;
            if (count == most) return -1;
            reached[j] = 1;
            found[count++] = j;
        }
    }
    return count;
}

void update_best(int64_t nq, int64_t ncol, int64_t stride, const float* scores, const int32_t* classes,
                 int64_t nbest, float* best, int32_t* best_class, int32_t* nnz) {
    if (nbest < 1) throw std::invalid_argument("the number of best classes is less than 1");
    parallel_blocks(nq, 256, [&](int64_t i0, int64_t i1) {
        for (int64_t i = i0; i < i1; i++) {
            const float* s = scores + i * stride;
            float* b = best + i * nbest;
            int32_t* bc = best_class + i * nbest;
            for (int64_t c = 0; c < ncol; c++) {
                if (s[c] == 0) continue;
                nnz[i]++;
                // of equal scores the lower class number ranks first
                auto before = [&](int64_t at) { return s[c] > b[at] || (s[c] == b[at] && classes[c] < bc[at]); };
                if (!before(nbest - 1)) continue;
                int64_t at = nbest - 1;
                for (; at > 0 && before(at - 1); at--) {
                    b[at] = b[at - 1];
                    bc[at] = bc[at - 1];
                }
                b[at] = s[c];
                bc[at] = classes[c];
            }
        }
    });
}

void neighbour_sums(int64_t nq, int64_t k, const int32_t* I, int64_t n, int64_t ncol, const float* L,
                    const float* scale, int64_t score_stride, float* scores) {
    parallel_blocks(nq, 64, [&](int64_t i0, int64_t i1) {
        for (int64_t i = i0; i < i1; i++) {
            float* s = scores + i * score_stride;
            std::fill(s, s + ncol, 0.0f);
            for (int64_t j = 0; j < k; j++) {
                const int32_t t = I[i * k + j];
                if (t < 0) continue;
                if (t >= n)
                    throw std::invalid_argument("query " + std::to_string(i) + " has neighbour " + std::to_string(t) +
                                                " of " + std::to_string(n) + " nodes");
                const float* row = L + (int64_t)t * ncol;
                for (int64_t c = 0; c < ncol; c++) s[c] += row[c];
            }
            if (scale)
                for (int64_t c = 0; c < ncol; c++) s[c] *= scale[c];
        }
    });
}

#ifdef GRAPH_UTILS_MKL

namespace {

void check(sparse_status_t status, const char* what) {
    if (status == SPARSE_STATUS_ALLOC_FAILED) throw std::bad_alloc();
    if (status != SPARSE_STATUS_SUCCESS)
        throw std::runtime_error(std::string("MKL: ") + what + " failed with status " + std::to_string((int)status));
}

}  // namespace

void mkl_product(int64_t n, int64_t ncols_A, const int64_t* indptr, const int32_t* indices, const float* values,
                 int64_t ncol, const float* L, float* out) {
    static const bool once = [] {
        // the other libraries of the process use GNU's OpenMP: one pool of threads instead of two
        mkl_set_threading_layer(MKL_THREADING_GNU);
        mkl_set_interface_layer(MKL_INTERFACE_LP64);
        return true;
    }();
    (void)once;
    if (!ncol || !ncols_A) {        // which MKL refuses
        std::fill(out, out + n * ncol, 0.0f);
        return;
    }
    constexpr int64_t most = (int64_t(1) << 31) - 1;
    std::vector<int32_t> begin;
    for (int64_t i0 = 0; i0 < n;) {
        int64_t i1 = i0;
        while (i1 < n && indptr[i1 + 1] - indptr[i0] <= most) i1++;
        if (i1 == i0) throw std::invalid_argument("a row has more than 2^31 - 1 entries");
        begin.resize(i1 - i0 + 1);
        for (int64_t i = i0; i <= i1; i++) begin[i - i0] = (int32_t)(indptr[i] - indptr[i0]);
        sparse_matrix_t A;
        check(mkl_sparse_s_create_csr(&A, SPARSE_INDEX_BASE_ZERO, (int)(i1 - i0), (int)ncols_A, begin.data(),
                                      begin.data() + 1, const_cast<int32_t*>(indices + indptr[i0]),
                                      const_cast<float*>(values + indptr[i0])),
              "mkl_sparse_s_create_csr");
        matrix_descr general{};
        general.type = SPARSE_MATRIX_TYPE_GENERAL;
        const sparse_status_t status =
            mkl_sparse_s_mm(SPARSE_OPERATION_NON_TRANSPOSE, 1.0f, A, general, SPARSE_LAYOUT_ROW_MAJOR, L, (int)ncol,
                            (int)ncol, 0.0f, out + i0 * ncol, (int)ncol);
        mkl_sparse_destroy(A);
        check(status, "mkl_sparse_s_mm");
        i0 = i1;
    }
}

#else

void mkl_product(int64_t, int64_t, const int64_t*, const int32_t*, const float*, int64_t, const float*, float*) {
    throw std::runtime_error("graph_utils was built without MKL: compile.bash says how to name it");
}

#endif
