// The memory of tensors on a CPU: one stretch of addresses that grows and is kept, apart from everything else.
//
// malloc puts small objects between tensors (PyTorch's headers, autograd's nodes, compiled kernels). What of them outlives the
// tensors beside it holds the heap apart, and the next large tensor needs new memory. Here nothing lies between tensors. Best fit,
// the lowest place among equals, neighbours joined: predict/arena.py does the same, so what a run will take is known before.

#include <c10/core/CPUAllocator.h>

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace {

constexpr size_t kLeast = SARTOR_LEAST_BYTES, kRound = SARTOR_ROUND_BYTES, kPage = size_t{2} << 20;

class Arena {
   public:
    void* take(size_t wanted) {
        const size_t size = (wanted + kRound - 1) / kRound * kRound;
        std::lock_guard<std::mutex> guard(mutex_);
        const auto found = by_size_.lower_bound({size, 0});
        size_t start;
        if (found != by_size_.end()) {
            start = found->second;
            const size_t whole = found->first;
            forget(start, whole);
            if (whole > size) note(start + size, whole - size);
        } else {
            start = top_;
            const auto last = ends_.find(top_);
            if (last != ends_.end()) start -= last->second;
            if (!reach(start + size)) return nullptr;
            if (start < top_) forget(start, top_ - start);
            top_ = start + size;
        }
        taken_[start] = size;
        in_use_ += size;
        return base_ + start;
    }

    void give(void* place) {
        std::lock_guard<std::mutex> guard(mutex_);
        size_t start = static_cast<char*>(place) - base_;
        const auto held = taken_.find(start);
        size_t size = held->second;
        taken_.erase(held);
        in_use_ -= size;
        const auto before = ends_.find(start);
        if (before != ends_.end()) {
            const size_t more = before->second;
            forget(start - more, more);
            start -= more;
            size += more;
        }
        const auto after = starts_.find(start + size);
        if (after != starts_.end()) {
            const size_t more = after->second;
            forget(start + size, more);
            size += more;
        }
        note(start, size);
    }

    bool holds(const void* place) const {
        const char* at = static_cast<const char*>(place);
        return base_ != nullptr && at >= base_ && at < base_ + reserved_;
    }

    // Pages of free blocks go back to the system; the addresses stay.
    size_t release() {
        std::lock_guard<std::mutex> guard(mutex_);
        size_t given = 0;
        for (const auto& [size, start] : by_size_) {
            if (madvise(base_ + start, size, MADV_DONTNEED) == 0) given += size;
        }
        return given;
    }

    size_t top() {
        std::lock_guard<std::mutex> guard(mutex_);
        return top_;
    }

    size_t in_use() {
        std::lock_guard<std::mutex> guard(mutex_);
        return in_use_;
    }

   private:
    // Make the first `end` bytes usable.
    bool reach(size_t end) {
        if (base_ == nullptr && !reserve()) return false;
        if (end <= usable_) return true;
        const size_t next = (end + kPage - 1) / kPage * kPage;
        if (next > reserved_ || mprotect(base_ + usable_, next - usable_, PROT_READ | PROT_WRITE) != 0) return false;
#ifdef MADV_HUGEPAGE
        madvise(base_ + usable_, next - usable_, MADV_HUGEPAGE);
#endif
        usable_ = next;
        return true;
    }

    // Addresses alone: what nobody may touch counts as no memory.
    bool reserve() {
        const size_t memory = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
        for (size_t size = 4 * memory / kPage * kPage; size >= (size_t{256} << 20); size = size / 2 / kPage * kPage) {
            void* place = mmap(nullptr, size + kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (place == MAP_FAILED) continue;
            const uintptr_t first = (reinterpret_cast<uintptr_t>(place) + kPage - 1) / kPage * kPage;
            reserved_ = size;
            base_ = reinterpret_cast<char*>(first);
            return true;
        }
        return false;
    }

    void note(size_t start, size_t size) {
        by_size_.insert({size, start});
        starts_[start] = size;
        ends_[start + size] = size;
    }

    void forget(size_t start, size_t size) {
        by_size_.erase({size, start});
        starts_.erase(start);
        ends_.erase(start + size);
    }

    std::mutex mutex_;
    std::set<std::pair<size_t, size_t>> by_size_;
    std::unordered_map<size_t, size_t> starts_, ends_, taken_;
    char* base_ = nullptr;
    size_t reserved_ = 0, usable_ = 0, top_ = 0, in_use_ = 0;
};

Arena& arena() {
    static Arena* made = new Arena();  // tensors may outlive static objects
    return *made;
}

c10::Allocator* before = nullptr;

void give(void* place) {
    if (place == nullptr) return;
    if (arena().holds(place)) {
        c10::profiledCPUMemoryReporter().Delete(place);
        arena().give(place);
    } else {
        before->raw_deleter()(place);
    }
}

struct Allocator final : c10::Allocator {
    c10::DataPtr allocate(size_t size) override {
        void* place = size >= kLeast ? arena().take(size) : nullptr;
        if (place == nullptr) {
            place = before->raw_allocate(size);  // small, or the arena cannot grow: then this tells so
        } else {
            c10::profiledCPUMemoryReporter().New(place, size);
        }
        return {place, place, &give, c10::Device(c10::DeviceType::CPU)};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &give; }

    void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};

}  // namespace

extern "C" {

// From now on tensors come from the arena; 0 where PyTorch's allocator is not its own.
int sartor_arena_use() {
    static Allocator* made = nullptr;
    if (made == nullptr) {
        c10::Allocator* usual = c10::GetCPUAllocator();
        if (usual != c10::GetDefaultCPUAllocator() || usual->raw_deleter() == nullptr) return 0;
        before = usual;
        made = new Allocator();
        c10::SetCPUAllocator(made);
    }
    return c10::GetCPUAllocator() == made;
}

size_t sartor_arena_top() { return arena().top(); }
size_t sartor_arena_in_use() { return arena().in_use(); }
size_t sartor_arena_release() { return arena().release(); }
}
