// K-nearest-neighbour search and graphs by inner product.
//
// Matrices are row major. Candidates are found with vectors in bytes, a quarter of the memory of float32 and, on CPUs with
// products of them, four to many times its speed; in bfloat16, whose errors are four times smaller, so that fewer candidates
// prove that they hold the best; or, where vectors are nearly the same, in float32. What is kept is computed again
// from the float32 vectors at the end (exact_products). `bits` is the size of an element. Vectors are padded with zeros to
// np words, a multiple of 16: of one element in float32, of two in bfloat16, of four in bytes, and one word more, the
// scale: an element is (byte - 128) scale, where 127 scale is the largest of the vector.
//
// A candidate list is K keys, 64-bit: the inner product in the upper half as an order-preserving integer; in the lower
// half 2^31 - 1 minus the neighbour's number, and in the lowest bit whether the neighbour is new to a round of
// neighbours-of-neighbours. So the greater key is the better neighbour, and of equal products the one with the lower
// number. Key 0 is "none"; any other that names 2^31 - 1 is none as well, and a bar that others have to pass. Lists are
// in no order. At most 2^31 - 1 vectors. Results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

// How products are computed: "amx" or "avx512" where the CPU has products of bfloat16 or bytes, "int16" where it has AVX2, for
// bytes, or "float32"; the first by default. use_products takes one of them, the default for "", and throws
// std::invalid_argument where the machine has it not.
std::string products();
void use_products(const std::string& name);

// out = x * scale in bfloat16; residual: the L2 norm of what rounding took away.
//
// x n x d; scale n or null; out n x np words; residual n or null
void to_bfloat16(int64_t n, int64_t d, const float* x, const float* scale, int64_t np, int32_t* out, float* residual);

// The same in bytes, out n x (np + 1) words
void to_bytes(int64_t n, int64_t d, const float* x, const float* scale, int64_t np, int32_t* out, float* residual);

// The K best of base vectors first .. first + nb - 1 for each query, joined with what keys held.
//
// Q nq x np, X nb x np words, or np + 1 in bytes; keys in/out nq x K (zeros to begin with)
// x_keys     in/out  null, or the lists of the base vectors, nb x x_K: the queries enter them, under the numbers of their
//                    rows in Q, and are marked as new there
// x_worst    in/out  nb: the worst product in each of x_keys, -inf where it is not full. Null if x_keys is
void search_all(int64_t nq, const int32_t* Q, int64_t nb, const int32_t* X, int64_t np, int bits, int64_t first,
                int64_t K, int64_t* keys, int64_t x_K, int64_t* x_keys, float* x_worst);

// The same for vectors among themselves, with half the products: rows first .. last - 1 of X are compared with each other
// and with those before. Memory: 8 bytes for each of 2.5 K candidates of `last` vectors, or of K + 16 where K is small.
//
// X last x np words, or np + 1 in bytes; keys in/out last x K
void search_self(int64_t first, int64_t last, const int32_t* X, int64_t np, int bits, int64_t K, int64_t* keys);

// The K best of those base vectors that are listed for each query's group. Quick if successive queries are of one group.
//
// Q          in  nq x np words, or np + 1 in bytes; X nb alike
// order      in  a permutation, or null: the i-th query is row order[i] of Q and of keys
// group      in  nq, of the i-th query
// listed     in  rows of X, none twice for a group: those for group g from offsets[g], ngroup + 1, to offsets[g + 1] - 1
// keys       out nq x K
void search_near(int64_t nq, const int32_t* Q, const int32_t* order, int64_t np, int bits, const int32_t* group,
                 int64_t ngroup, const int64_t* offsets, const int32_t* listed, int64_t nb, const int32_t* X, int64_t K,
                 int64_t* keys);

// The K best of the base vectors in each query's nprobe nearest cells, joined with what keys held (and more cells, while
// they hold fewer than K vectors). Quick if successive queries are near each other.
//
// centroids  in  nlist x np words, or np + 1 in bytes; Q and X alike
// own        in  nq, or null: a cell near each query. Only cells listed for that one, as in search_near, are then looked at for
//                the nearest. Quick if successive queries have the same
// before     in  the nearest cells, so many of those listed for own_before, or of all if that is null, are left out, as they were
//                searched. keys may hold vectors of the others as well, and what enters is marked as new. Not with x_keys
// begin, end in  nlist: rows of X that are searched when cell c is, which the caller has checked; numbers in the keys are rows
//                of X
// keys       in/out  nq x K
//
// x_keys     in/out  null, or the lists of the rows of X, n x K: the queries enter those of the rows that they are
//                    compared with, of each cell the rows begin .. middle - 1, and are marked as new there
// middle     in  nlist; numbers in: nq, what the queries are called in x_keys. Null if x_keys is
// x_worst    in/out  n: the worst product in each of x_keys, -inf where it is not full. Null if x_keys is
void search_cells(int64_t nq, const int32_t* Q, int64_t np, int bits, int64_t nlist, const int32_t* centroids,
                  const int32_t* own, const int64_t* offsets, const int32_t* listed, int64_t nprobe, const int32_t* own_before,
                  const int64_t* offsets_before, const int32_t* listed_before, int64_t before, const int64_t* begin,
                  const int64_t* end, const int32_t* X, int64_t K, int64_t* keys, const int64_t* middle,
                  const int32_t* numbers, int64_t* x_keys, float* x_worst);

// Sums of rows of x, group by group.
//
// x          in  n x d
// order      in  m rows of x; those of group g are order[end[g - 1]] .. order[end[g] - 1]
// out        out ngroup x d
void group_sums(int64_t n, int64_t d, const float* x, int64_t m, const int32_t* order, int64_t ngroup, const int64_t* end,
                float* out);

// Candidate lists from known neighbours, with products of the vectors in X. They are not marked as new.
//
// order, position in  n: row p of X is node order[p]; node i is in row position[i]
// I          in  n0 x k: neighbours of the first n0 nodes, as nodes; -1 after the last
// margin     in  places after k known neighbours get a bar: what is worse than these by more does not enter
// keys       out n x K, K >= k, by rows of X; zeros for other nodes
void known_lists(int64_t n, const int32_t* X, int64_t np, int bits, const int32_t* order, const int32_t* position,
                 int64_t n0, int64_t k, const int32_t* I, float margin, int64_t K, int64_t* keys);

// One round of neighbours-of-neighbours on a graph (NN-descent: Dong et al., WWW 2011). Deterministic.
//
// start_round copies the lists and marks all entries as old; reverse_offsets counts who has each node as a neighbour, and
// reverse_lists makes the lists of these for a range of nodes; join_range then compares, for each node of a range, all of its
// neighbours and up to R of its reverse neighbours with each other, where at least one is new, and inserts in the keys of the
// targets, a range of nodes as well. Where these are not all nodes it computes each product that is of use to two of them twice.
//
// keys      in/out  n x K, of join_range (to_target - from_target) x K
// lists     out     n x K: neighbour numbers, those of new entries with the top bit set; -1 for none
// worst     out     the least inner product of each full list of keys, -inf of others. Kept up to date by join_range
// offsets   out     n + 1, offsets[n] <= n K; of the other two those of their range
// reverse   out     node after node, of reverse_lists those of its range, each list in no order; top bit as in lists
// seed      in      of the choice of R reverse neighbours where there are more
void start_round(int64_t n, int64_t K, int64_t* keys, int32_t* lists, float* worst);
int64_t reverse_offsets(int64_t n, int64_t K, const int32_t* lists, int64_t* offsets);
void reverse_lists(int64_t n, int64_t K, const int32_t* lists, int64_t first, int64_t last, const int64_t* offsets,
                   int32_t* reverse);
// Returns the number of insertions.
int64_t join_range(int64_t n, const int32_t* X, int64_t np, int bits, int64_t K, const int32_t* lists,
                   const int64_t* offsets, const int32_t* reverse, int64_t R, int64_t seed, int64_t first, int64_t last,
                   int64_t from_target, int64_t to_target, int64_t* keys, float* worst);

// Exact float32 inner products of what lists of keys name, sorted; the k best of them, none twice.
//
// keys      in   nq x K; q_number in: nq, or null for 0 .. nq - 1: row of the queries and of the outputs of list q
// x_number  in   nnumber, or null: original number of each number in the keys; nnumber is nX then
// Q0, Q1    in   nQ query vectors: the first nQ0 in Q0, others in Q1 (may be null); q_scale in: factor of each, or null
// X0, X1    in   the same for the base vectors
// same      in   1: queries are the base vectors, and each is in its own list: as the first, where none is nearer than
//                itself by more than 1e-6 of the product, so that it is among the first k' of k as well
// known     in   rows of D, I before this one hold products that need not be computed again
// D, I      in/out  nQ rows of k products and numbers, best first, -inf and -1 where there are fewer; of other rows than those of
//                the lists nothing is read or written
// Throws std::invalid_argument where a number is that of no vector.
void exact_products(int64_t nq, int64_t K, const int64_t* keys, const int32_t* q_number, const int32_t* x_number,
                    int64_t nnumber, int64_t d, const float* Q0, int64_t nQ0, const float* Q1, int64_t nQ, const float* q_scale,
                    const float* X0, int64_t nX0, const float* X1, int64_t nX, const float* x_scale, int same, int64_t k,
                    int64_t known, float* D, int32_t* I);

// The same in two steps, where the base vectors need not be in memory at once. Products with those numbered
// first .. first + nX - 1:
//
// numbers   in   nq x K, negative for none
// Q, X      in   vectors of the lists and base vectors; q_scale, x_scale in: their factors, or null
// products  out  nq x K, where a number is that of a vector in X; other places are left as they are
void products_in_part(int64_t nq, int64_t K, const int32_t* numbers, int64_t d, const float* Q, const float* q_scale,
                      int64_t first, int64_t nX, const float* X, const float* x_scale, float* products);

// And the k best, for queries that are the base vectors first .. first + nq - 1, each in its own list; otherwise
// std::invalid_argument is thrown. D, I (in/out) are rows of these alone, of which the first `known` hold products already.
void best_by_products(int64_t nq, int64_t K, const int32_t* numbers, const float* products, int64_t first, int64_t known,
                      int64_t k, float* D, int32_t* I);

// Rows of a file of float32, d to a row, read by several threads; row numbers outside 0 .. nrow - 1 are left out.
//
// file  in   descriptor, open for reading; throws std::invalid_argument if it ends before a row, std::system_error if it
//            cannot be read
// rows  in   n; out n x d
void read_rows(int file, int64_t nrow, int64_t n, const int64_t* rows, int64_t d, float* out);

// The k best of two neighbour lists per row, each best first with -1 at the end; out may be neither of the inputs. own: null, or
// n, of which each stays the first where the first list begins with it.
void merge_lists(int64_t n, int64_t k1, const float* D1, const int32_t* I1, int64_t k2, const float* D2,
                 const int32_t* I2, const int32_t* own, int64_t k, float* D, int32_t* I);
