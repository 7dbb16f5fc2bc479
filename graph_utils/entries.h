// Numbers that are in memory, or in a file, of which each thread has some at a time in a buffer of its own.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

// Read so many bytes of a file. what(): what they are, for the error where they are not there.
template <class What>
void read_at(int file, void* to, int64_t bytes, int64_t offset, What what) {
    for (int64_t done = 0; done < bytes;) {
        const ssize_t got = pread(file, (char*)to + done, bytes - done, offset + done);
        if (got == 0) throw std::invalid_argument("the file ends before the end of " + what());
        if (got < 0 && errno != EINTR) throw std::system_error(errno, std::generic_category(), what());
        done += std::max<ssize_t>(got, 0);
    }
}

class Entries {
  public:
    // file: -1 where they are in memory
    Entries(const int32_t* memory, int file) : memory_(memory), file_(file) {}

    bool in_file() const { return file_ >= 0; }

    // For begin <= e < end, [e] of what this returns is entry e, until the next call with this buffer.
    const int32_t* get(int64_t begin, int64_t end, std::vector<int32_t>& buffer) const {
        if (!in_file()) return memory_;
        buffer.resize(end - begin);
        read_at(file_, buffer.data(), 4 * (end - begin), 4 * begin, [] { return std::string("the entries"); });
        return reinterpret_cast<const int32_t*>(reinterpret_cast<uintptr_t>(buffer.data()) - 4 * begin);
    }

  private:
    const int32_t* memory_;
    int file_;
};
