// Stochastic gradient descent with momentum for many linear classifiers on the same mini-batches.
//
// Matrices are row major. There are G classifiers of C classes each, whose rows follow each other: row g C + c. Sizes
// named *pad are rounded up, dpad and npad to multiples of 32, Bpad to one of sgd_multiple(); rows and columns that pad hold
// zeros, on input and on output. One mini-batch has B images, Bpad with padding; T of them lie side by side in P and Z,
// `T Bpad` columns.
#pragma once

#include <cstdint>
#include <stdexcept>

// How the products of sgd_pass and sgd_gradients are computed; sums are float32 always.
//
// kFloat32   in float32
// kSplit     in bfloat16 tiles (AMX) where the machine has them: every float32 is split in two bfloat16 numbers, high and
//            low, and three of their four products are summed (relative error about 1e-5 of the largest terms); else
//            in float32
// kBfloat16  of factors rounded to bfloat16, by tiles, by AVX-512, or by float32 arithmetic, whatever the machine has
enum { kFloat32, kSplit, kBfloat16 };

// Whether this machine has the tiles.
bool sgd_has_tiles();

// Whether it multiplies numbers in bfloat16 faster than others.
bool sgd_has_bfloat16();

// What the images of a mini-batch are padded to a multiple of: 32 with these tiles, else 16.
int64_t sgd_multiple(int arithmetic);

// Bytes of scratch memory for T mini-batches of Bpad images at a time, with the present number of threads.
int64_t sgd_scratch(int64_t G, int64_t C, int64_t dpad, int64_t T, int64_t Bpad);

// One pass over the parameters: apply the gradients of T0 mini-batches one after the other,
//
//     M <- mom M + P^T X + wd W,    W <- W - lr M    for each (the same for the biases b, with moments mb),
//
// then compute the logits of T1 mini-batches that come next, for the parameters as they would be if the gradients
// of these were zero: for the t-th one, with (alpha, beta) = ahead[g][t],
//
//     Z[row][t] = X1[t] (alpha W + beta M)[row] + (alpha b + beta mb)[row].
//
// lr, wd   in      G learning rates and weight decays
// W, M     in/out  npad x dpad, npad >= G C; 64-byte aligned
// b, mb    in/out  npad
// X0       in      T0 Bpad x dpad, the images of the mini-batches; null if T0 = 0
// P        in      npad x T0 Bpad, gradient of the loss in the logits
// X1       in      T1 B1pad x dpad; null if T1 = 0
// ahead    in      G x T1 x 2
// Z        out     npad x T1 B1pad
// arithmetic       kFloat32, kSplit or kBfloat16
// scratch          sgd_scratch() bytes for the larger T and Bpad of both; aligned to 64 bytes
void sgd_pass(int64_t G, int64_t C, int64_t dpad, float mom, const float* lr, const float* wd, float* W, float* M,
              float* b, float* mb, int64_t T0, int64_t Bpad, const float* X0, const float* P, int64_t T1,
              int64_t B1pad, const float* X1, const float* ahead, float* Z, int arithmetic, uint8_t* scratch);

// Gradients of the mean softmax loss in the logits, for T mini-batches that follow each other. In place of Z, the logits
// for zero gradients from sgd_pass; each mini-batch's are first corrected for the gradients of those before it,
//
//     Z[row][t] += sum over s < t of response[g][t - s - 1] P[row][s] (X_s X_t^T + 1),
//
// then P[row][t] = (softmax over the classes of Z[t] - one-hot(y_t)) / B.
//
// B         in      images per mini-batch, B <= Bpad
// X         in      T Bpad x dpad
// y         in      T x B classes, 0 .. C - 1
// response  in      G x T: change of W by a unit gradient, 1 .. T steps later
// Z         in/out  npad x T Bpad; zeros where it pads on output
// losses    out     T x G x B, the loss of each image, or null
void sgd_gradients(int64_t G, int64_t C, int64_t dpad, int64_t T, int64_t B, int64_t Bpad, const float* X,
                   const int64_t* y, const float* response, float* Z, double* losses, int arithmetic, uint8_t* scratch);

// out[i] = X[images[i]] for n images of d columns; row i of out starts at (i / B) Bpad + i % B times dpad.
// What pads there stays as it is.
void gather_batches(int64_t nX, int64_t d, const float* X, int64_t n, const int64_t* images, int64_t B, int64_t Bpad,
                    int64_t dpad, float* out);

// ranks[g][i]: how many classes come before the class y[i] of image i in classifier g: those of a higher score, and of
// an equal one with a lower number. 2^31 - 1 if the score of y[i] is NaN.
//
// Z npad x stride, whose first B columns are the images; y B; ranks out: G x B
void ranks_of(int64_t G, int64_t C, int64_t B, int64_t stride, const float* Z, const int64_t* y, int32_t* ranks);

// top[g][i]: whether fewer than `most` classes come before the class y[i] of image i, as by ranks_of, but for scores that
// are exact. Z has those of sgd_pass in bfloat16: how far these may be off tells for most images; for the others the
// scores in doubt are computed in double precision. Where that would be more than most_products scores in a classifier,
// its images in doubt remain kUnknown.
//
// Z                 in   npad x stride
// X, W, b           in   B x dpad, npad x dpad, npad
// x_norms, w_norms  in   B x 2, npad x 2: norms of the rows of X and W, and of what rounding to bfloat16 takes from them; not
//                        too small, also for the rows as rounded
// top               out  G x B
enum { kUnknown = 2 };
void top_of(int64_t G, int64_t C, int64_t dpad, int64_t B, int64_t stride, int64_t most, const float* Z, const float* X,
            const float* x_norms, const float* W, const float* b, const float* w_norms, const int64_t* y, int64_t most_products,
            uint8_t* top);
