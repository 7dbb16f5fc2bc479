// Orders of the nodes of a k-nearest-neighbour graph.
#pragma once

#include <cstdint>

// An order of the nodes in which neighbours are near each other, found from the graph alone: label propagation gathers
// the nodes in clusters of at most 256, these in clusters of at most 1024 nodes, and so on; clusters are then laid out
// from the largest to the smallest, each one's parts chained by the number of edges between them.
//
// Does not depend on the number of threads. Memory: about 25 bytes per node, up to 100 where neighbours are at random.
//
// I      in   n x k neighbour numbers, row stride `stride` >= k; negative numbers mean "none"
// order  out  n node numbers, a permutation
// Throws std::invalid_argument if a neighbour is out of range.
void locality_order(int64_t n, int64_t k, int64_t stride, const int32_t* I, int32_t* order);
