// Sparse-dense products for label diffusion.
//
// Matrices are row major. A graph on n nodes is CSR: the neighbours of node i are indices[indptr[i] .. indptr[i+1]).
// Edge counts and offsets are 64-bit, node numbers 32-bit.
#pragma once

#include <cstdint>
#include <stdexcept>

// Whether the library was built with MKL.
bool has_mkl();

// Threads that the parallel loops of this library use (OMP_NUM_THREADS, or all CPUs); set: n >= 1, for calls by this thread.
int get_num_threads();
void set_num_threads(int n);

// First pass of the symmetrisation W = W0 + W0^T, where W0 has a one at (i, I[i, j]).
//
// I        in   n x k neighbour numbers, row stride `stride` >= k; negative numbers mean "none"; a neighbour may not
//               be listed twice in a row. May contain i itself.
// rank     in   n new node numbers (a permutation), or null for the identity: node i becomes rank[i]
// indptr   out  n + 1 offsets, with room in each row for all of its edges, mutual ones counted once
// mutual   out  n x ceil(k / 8) bytes, for the second pass: bit j of row i tells whether I[i, j] lists i, too
// Returns the number of entries, indptr[n]. Throws std::invalid_argument if a neighbour is out of range or repeated.
int64_t symmetrise_count(int64_t n, int64_t k, int64_t stride, const int32_t* I, const int32_t* rank, int64_t* indptr,
                         uint8_t* mutual);

// Second pass: fill the rows that symmetrise_count laid out.
//
// indptr, mutual  in  from symmetrise_count
// indices  out  indptr[n] neighbours; in each row first those of multiplicity 1, then the mutual ones (multiplicity 2),
//               each part in increasing order
// nsingle  out  n: how many neighbours of the row have multiplicity 1
void symmetrise_fill(int64_t n, int64_t k, int64_t stride, const int32_t* I, const int32_t* rank, const int64_t* indptr,
                     const uint8_t* mutual, int32_t* indices, int32_t* nsingle);

// A graph of symmetrise_fill with some multiplicities changed and nodes added: first pass, the new offsets.
//
// indptr, indices, nsingle  in   of n0 nodes, nnz entries. Both passes throw std::invalid_argument where they are out of
//                                range or order
// n                         in   nodes afterwards, >= n0
// row, column, by           in   nchange changes by -2 .. 2, in increasing order of row and then column, none twice;
//                                multiplicities have to be from 0 to 2 afterwards
// new_indptr, new_nsingle   out  n + 1, n
void change_count(int64_t n0, const int64_t* indptr, int64_t nnz, const int32_t* indices, const int32_t* nsingle, int64_t n,
                  int64_t nchange, const int32_t* row, const int32_t* column, const int8_t* by, int64_t* new_indptr,
                  int32_t* new_nsingle);

// Second pass: new_indices, new_indptr[n], from the same changes.
void change_fill(int64_t n0, const int64_t* indptr, const int32_t* indices, const int32_t* nsingle, int64_t n, int64_t nchange,
                 const int32_t* row, const int32_t* column, const int8_t* by, const int64_t* new_indptr,
                 const int32_t* new_nsingle, int32_t* new_indices);

// out = diag(1 / row sums of W) W L diag(scale), and the column sums of out.
//
// W has entries 1 and 2 as laid out by symmetrise_fill; rows without neighbours give zeros.
// indices, file   in   the entries in memory, or where file is not -1, in that file from its beginning (for mass and reach, too)
// ncol     columns of L and out: a multiple of 16, at most 64; both 64-byte aligned
// L        in   n x ncol
// scale    in   ncol factors, or null for ones
// rows     in   nrow row numbers to compute, or null for all n; other rows of out are left as they are
// weights  in   n factors of the rows in the column sums, or null for ones
// out      out  n x ncol, no part of it in L
// colsum   out  ncol sums of out over the rows computed
void product(int64_t n, const int64_t* indptr, const int32_t* indices, int file, const int32_t* nsingle, int64_t ncol,
             const float* L, const float* scale, int64_t nrow, const int32_t* rows, const float* weights, float* out,
             double* colsum);

// out = 1^T diag(1 / row sums of W) W, n numbers: with them as weights, one product gives the column sums of the next.
void mass(int64_t n, const int64_t* indptr, const int32_t* indices, int file, const int32_t* nsingle, float* out);

// Neighbours of `rows` that are not reached yet: marked in `reached` (n flags, in and out) and listed in `found`.
// Returns their number, or -1 as soon as there are more than `most` (found has room for that many).
int64_t reach(const int64_t* indptr, const int32_t* indices, int file, int64_t nrow, const int32_t* rows, uint8_t* reached,
              int64_t most, int32_t* found);

// Take the scores of some classes into account for the best classes of each query.
//
// scores      in      nq x ncol, row stride `stride`; zeros do not count
// classes     in      ncol class numbers of these columns
// best        in/out  nq x nbest highest scores so far, decreasing, zero where there are fewer; of equal scores the
//                     lower class number comes first
// best_class  in/out  nq x nbest their classes, -1 where there are fewer
// nnz         in/out  nq numbers of classes with a non-zero score
void update_best(int64_t nq, int64_t ncol, int64_t stride, const float* scores, const int32_t* classes,
                 int64_t nbest, float* best, int32_t* best_class, int32_t* nnz);

// scores[i] = sum over j < k of L[I[i, j]], times scale. Negative neighbours count nothing.
//
// I nq x k; L n x ncol, any ncol; scale ncol or null; scores nq x ncol with row stride score_stride
void neighbour_sums(int64_t nq, int64_t k, const int32_t* I, int64_t n, int64_t ncol, const float* L, const float* scale,
                    int64_t score_stride, float* scores);

// out = A L by MKL's inspector-executor product, A in CSR with a value array.
//
// Row blocks of fewer than 2^31 edges are given to MKL one after the other, as its LP64 interface has 32-bit offsets.
// indptr n + 1, indices and values indptr[n], L ncols_A x ncol, out n x ncol. Throws std::runtime_error without MKL.
void mkl_product(int64_t n, int64_t ncols_A, const int64_t* indptr, const int32_t* indices, const float* values,
                 int64_t ncol, const float* L, float* out);
