// K-nearest-neighbour graphs on vectors. Matrices are row major; a graph is a matrix of neighbour numbers (n x k), best
// first, with -1 where a node has fewer than k neighbours.
#pragma once

#include <cstdint>
