#include "ordering.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <utility>
#include <vector>

#include "parallel.h"

namespace {

constexpr int64_t kSmallest = 256;      // nodes of the smallest clusters: 64 KB of a panel of L, near the size of an L1 cache
constexpr int64_t kGrowth = 4;          // how much larger the clusters of the next level are
constexpr int kRounds = 6;              // rounds of label propagation
constexpr int64_t kKept = 32;           // neighbouring clusters that a cluster remembers, the most connected ones
constexpr int64_t kChained = 1024;      // parts chained at a time: the time is quadratic in it
constexpr float kDecay = 0.7f;          // what an edge to a part counts less for each part placed after it

struct Edge {
    int32_t to;
    float weight;
};

// A graph whose nodes are nodes or clusters: either I, with weights one, or lists of edges.
struct Level {
    int64_t n = 0;
    const int32_t* I = nullptr;
    int64_t k = 0, stride = 0;
    std::vector<int64_t> offset;
    std::vector<Edge> edges;
    std::vector<int32_t> size;          // nodes in each cluster; empty: ones
    std::vector<int32_t> cluster;       // of the next level, for each of this one's

    int64_t degree(int64_t i) const { return I ? k : offset[i + 1] - offset[i]; }
    int32_t weight_of(int64_t i) const { return size.empty() ? 1 : size[i]; }

    template <class Visit>
    void each_edge(int64_t i, Visit visit) const {
        if (I) {
            for (const int32_t *t = I + i * stride, *end = t + k; t < end; t++)
                if (*t >= 0 && *t != i) visit(*t, 1.0f);
        } else {
            for (int64_t e = offset[i]; e < offset[i + 1]; e++) visit(edges[e].to, edges[e].weight);
        }
    }
};

// Sums of weights per label, for the edges of one node: a small hash table.
class Tally {
public:
    void start(int64_t most) {
        size_t room = 16;
        while (room < 2 * (size_t)most) room *= 2;
        if (slot_.size() < room) {
            slot_.assign(room, -1);
            mask_ = room - 1;
        } else {
            for (size_t at : used_) slot_[at] = -1;
        }
        used_.clear();
        entries.clear();
    }
    void add(int32_t label, float weight) {
        size_t at = ((uint32_t)label * 2654435769u >> 8) & mask_;
        while (slot_[at] >= 0 && entries[slot_[at]].to != label) at = (at + 1) & mask_;
        if (slot_[at] < 0) {
            slot_[at] = (int32_t)entries.size();
            used_.push_back(at);
            entries.push_back({label, weight});
        } else {
            entries[slot_[at]].weight += weight;
        }
    }
    std::vector<Edge> entries;          // in the order in which the labels were first seen

private:
    std::vector<int32_t> slot_;
    std::vector<size_t> used_;
    size_t mask_ = 0;
};

// Label propagation with clusters of at most `limit` nodes: each node moves to the cluster that most of its edges go to.
// Nodes are dealt with in batches that see the state before the batch, so that threads do not matter. A batch has its nodes from
// all over: neighbours with near numbers, as in a sequence, would move at the same time, each to where the next one just was.
std::vector<int32_t> propagate(const Level& g, int64_t limit) {
    const int64_t n = g.n;
    std::vector<int32_t> label(n), room(n);
    for (int64_t i = 0; i < n; i++) {
        label[i] = (int32_t)i;
        room[i] = (int32_t)std::max<int64_t>(limit - g.weight_of(i), 0);
    }
    const int64_t nbatch = std::clamp<int64_t>(n / 256, 1, 32);
    std::vector<int32_t> wish((n + nbatch - 1) / nbatch);
    for (int round = 0; round < kRounds; round++) {
        int64_t moved = 0;
        for (int64_t b = 0; b < nbatch; b++) {
            const int64_t count = (n - b + nbatch - 1) / nbatch;        // of nodes b, b + nbatch, ...
            // waking the threads up takes longer than a small batch
            parallel_blocks<Tally>(count, count > 2048 ? 256 : 2048, [&](int64_t x0, int64_t x1, Tally& tally) {
                for (int64_t x = x0; x < x1; x++) {
                    const int64_t i = b + x * nbatch, later = i + 8 * nbatch;
                    if (g.I && later + 8 * nbatch < n)
                        for (int64_t j = 0; j < g.k; j += 16) __builtin_prefetch(g.I + (later + 8 * nbatch) * g.stride + j);
                    if (g.I && later < n)
                        for (int64_t j = 0; j < g.k; j++) __builtin_prefetch(&label[std::max(g.I[later * g.stride + j], 0)]);
                    tally.start(g.degree(i));
                    g.each_edge(i, [&](int32_t t, float weight) { tally.add(label[t], weight); });
                    int32_t best = label[i];
                    float most = 0;
                    for (const Edge& e : tally.entries)
                        if (e.to == best) most = e.weight;
                    for (const Edge& e : tally.entries)
                        if (e.weight > most && room[e.to] >= g.weight_of(i)) {
                            most = e.weight;
                            best = e.to;
                        }
                    wish[x] = best;
                }
            });
            for (int64_t x = 0; x < count; x++) {
                const int64_t i = b + x * nbatch;
                const int32_t to = wish[x], weight = g.weight_of(i);
                if (to == label[i] || room[to] < weight) continue;
                room[label[i]] += weight;
                room[to] -= weight;
                label[i] = to;
                moved++;
            }
        }
        if (moved < n / 200) break;
    }
    return label;
}

// Members of each of m clusters: members[start[c] .. start[c + 1]), increasing.
void list_members(const std::vector<int32_t>& cluster, int64_t m, std::vector<int64_t>& start,
                  std::vector<int32_t>& members) {
    start.assign(m + 2, 0);     // while members are listed, where cluster c goes on is at c + 1
    for (int32_t c : cluster) start[c + 2]++;
    for (int64_t c = 0; c < m; c++) start[c + 2] += start[c + 1];
    members.resize(cluster.size());
    for (size_t i = 0; i < cluster.size(); i++) members[start[cluster[i] + 1]++] = (int32_t)i;
    start.pop_back();
}

// The graph whose nodes are the clusters of g, which are numbered here.
Level contract(Level& g) {
    std::vector<int32_t> number(g.n, -1);
    int32_t m = 0;
    for (int32_t& c : g.cluster) {
        if (number[c] < 0) number[c] = m++;
        c = number[c];
    }
    std::vector<int32_t>().swap(number);
    Level next;
    next.n = m;
    next.size.assign(m, 0);
    for (int64_t i = 0; i < g.n; i++) next.size[g.cluster[i]] += g.weight_of(i);
    std::vector<int64_t> start;
    std::vector<int32_t> members;
    list_members(g.cluster, m, start, members);
    constexpr int64_t block = 64;
    std::vector<std::vector<Edge>> found((m + block - 1) / block);
    next.offset.assign(m + 1, 0);
    parallel_blocks<Tally>(m, block, [&](int64_t c0, int64_t c1, Tally& tally) {
        for (int64_t c = c0; c < c1; c++) {
            int64_t most = 0;
            for (int64_t at = start[c]; at < start[c + 1]; at++) most += g.degree(members[at]);
            tally.start(std::min<int64_t>(most, m));
            for (int64_t at = start[c]; at < start[c + 1]; at++)
                g.each_edge(members[at], [&](int32_t t, float weight) {
                    if (g.cluster[t] != c) tally.add(g.cluster[t], weight);
                });
            std::vector<Edge>& all = tally.entries;
            const size_t kept = std::min<size_t>(kKept, all.size());
            std::partial_sort(all.begin(), all.begin() + kept, all.end(), [](Edge x, Edge y) {
                return x.weight != y.weight ? x.weight > y.weight : x.to < y.to;
            });
            next.offset[c + 1] = (int64_t)kept;
            found[c0 / block].insert(found[c0 / block].end(), all.begin(), all.begin() + kept);
        }
    });
    for (int64_t c = 0; c < m; c++) next.offset[c + 1] += next.offset[c];
    next.edges.reserve(next.offset[m]);
    for (auto& part : found) {
        next.edges.insert(next.edges.end(), part.begin(), part.end());
        std::vector<Edge>().swap(part);
    }
    return next;
}

// The sequence of g's nodes, given that of their clusters: the members of each are chained, beginning with the one that
// has most edges to the cluster before; the next one is the one that those placed have most edges to, of late above all.
std::vector<int32_t> expand(const Level& g, const std::vector<int32_t>& clusters) {
    const int64_t m = (int64_t)clusters.size();
    std::vector<int64_t> start;
    std::vector<int32_t> members;
    list_members(g.cluster, m, start, members);
    std::vector<int32_t> where(g.n);            // place of each node among the members of its cluster
    for (int64_t c = 0; c < m; c++)
        for (int64_t at = start[c]; at < start[c + 1]; at++) where[members[at]] = (int32_t)(at - start[c]);
    struct Scratch {
        std::vector<float> score;
        std::vector<int32_t> left, chain;
    };
    parallel_blocks<Scratch>(m, 16, [&](int64_t s0, int64_t s1, Scratch& scratch) {
        std::vector<float>& score = scratch.score;
        std::vector<int32_t>&left = scratch.left, &chain = scratch.chain;
        for (int64_t s = s0; s < s1; s++) {
            const int32_t c = clusters[s], before = s ? clusters[s - 1] : -1;
            int32_t* const all = members.data() + start[c];
            const int64_t count = start[c + 1] - start[c];
            score.assign(count, 0.0f);
            for (int64_t x = 0; x < count && s; x++)
                g.each_edge(all[x], [&](int32_t t, float weight) {
                    if (g.cluster[t] == before) score[x] += weight;
                });
            chain.clear();
            for (int64_t x0 = 0; x0 < count; x0 += kChained) {
                left.clear();
                for (int64_t x = x0; x < std::min(count, x0 + kChained); x++) left.push_back((int32_t)x);
                while (!left.empty()) {
                    size_t best = 0;
                    for (size_t y = 1; y < left.size(); y++)
                        if (score[left[y]] > score[left[best]]) best = y;
                    const int32_t node = all[left[best]];
                    chain.push_back(node);
                    left.erase(left.begin() + best);
                    for (int32_t x : left) score[x] *= kDecay;
                    g.each_edge(node, [&](int32_t t, float weight) {
                        if (g.cluster[t] == c) score[where[t]] += weight;
                    });
                }
            }
            std::copy(chain.begin(), chain.end(), all);
        }
    });
    std::vector<int32_t> sequence;
    sequence.reserve(g.n);
    for (int32_t c : clusters) sequence.insert(sequence.end(), members.begin() + start[c], members.begin() + start[c + 1]);
    return sequence;
}

}  // namespace

void locality_order(int64_t n, int64_t k, int64_t stride, const int32_t* I, int32_t* order) {
    std::atomic<bool> bad{false};
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < k; j++)
            if (I[i * stride + j] >= n) bad = true;
    if (bad) throw std::invalid_argument("a neighbour is not below the number of nodes");
    if (!n) return;
    std::vector<Level> levels(1);
    levels[0].n = n;
    levels[0].I = I;
    levels[0].k = k;
    levels[0].stride = stride;
    for (int64_t limit = kSmallest;; limit *= kGrowth) {
        Level& g = levels.back();
        g.cluster = propagate(g, std::min<int64_t>(limit, n));
        Level next = contract(g);
        const bool last = next.n == 1 || next.edges.empty() || limit >= n;
        levels.push_back(std::move(next));
        if (last) break;
    }
    levels.back().cluster.assign(levels.back().n, 0);
    std::vector<int32_t> sequence{0};
    while (!levels.empty()) {
        sequence = expand(levels.back(), sequence);
        levels.pop_back();
    }
    std::copy(sequence.begin(), sequence.end(), order);
}
