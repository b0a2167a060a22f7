// The threads that help with a step: one team for the process.
//
// OpenMP's threads meet at barriers, dozens of times in a step, and each has to come. That goes wrong wherever one of
// them has no core for a while, because another process wants it or because it must be woken up: asleep between steps it
// comes late, and spinning between them it takes the core from Python. Here work is cut into chunks, whoever is awake
// takes the next one, and nobody waits for a thread that has taken none: a helper that never comes costs nothing.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#include <immintrin.h>
#include <sched.h>

class Team {
  public:
    // A caller's turn with the team. Whoever comes while it is taken works alone.
    class Turn {
      public:
        Turn(Team& team, int64_t threads) : team(team), mine(threads > 1 && team.busy.try_lock()) {
            if (mine) team.wake(static_cast<int>(threads) - 1);
        }
        ~Turn() {
            if (!mine) return;
            team.helpers.store(0, std::memory_order_relaxed);
            team.busy.unlock();
        }
        Turn(const Turn&) = delete;
        // body(i) for every i below count, in any order; all are done when it returns.
        template <class Body>
        void each(int64_t count, Body&& body) {
            if (mine && count > 1)
                team.share(count, body);
            else
                for (int64_t i = 0; i < count; i++) body(i);
        }
        // How many threads may take part.
        int64_t threads() const { return mine ? team.helpers.load(std::memory_order_relaxed) + 1 : 1; }

      private:
        Team& team;
        const bool mine;
    };

  private:
    static constexpr int PATIENCE = 20000;  // looks for work before a helper goes to sleep: some 0.4 ms

    template <class Body>
    void share(int64_t count, Body& body) {
        call.store([](void* to, int64_t i) { (*static_cast<Body*>(to))(i); }, std::memory_order_relaxed);
        argument.store(const_cast<void*>(static_cast<const void*>(&body)), std::memory_order_relaxed);
        done.store(0, std::memory_order_relaxed);
        open.store(++phase << 32 | static_cast<uint64_t>(count), std::memory_order_release);
        while (take()) {}
        for (int look = 0; done.load(std::memory_order_acquire) != count; look++) pause(look);
    }

    // Does one chunk of what is open. `open` holds the phase above the number of chunks that nobody has taken, so that
    // a helper that comes late takes none of another phase: while its own has some, call and argument stay.
    bool take() {
        uint64_t now = open.load(std::memory_order_acquire);
        while (now & 0xffffffffu) {
            const auto function = call.load(std::memory_order_relaxed);
            void* const to = argument.load(std::memory_order_relaxed);
            if (open.compare_exchange_weak(now, now - 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
                function(to, static_cast<int64_t>(now & 0xffffffffu) - 1);
                done.fetch_add(1, std::memory_order_release);
                return true;
            }
        }
        return false;
    }

    static void pause(int look) {
        if (look % 32 == 31)
            sched_yield();
        else
            _mm_pause();
    }

    void wake(int wanted) {
        try {
            for (; started < wanted; started++) std::thread([this, number = started] { help(number); }).detach();
        } catch (const std::system_error&) {  // no more threads here
            wanted = started;
        }
        std::lock_guard lock(mutex);
        helpers.store(wanted, std::memory_order_relaxed);
        turns++;
        if (sleeping > 0) awake.notify_all();
    }

    void help(int number) {
        uint64_t seen = 0;
        for (;;) {
            for (int look = 0; look < PATIENCE; look++)
                if (number < helpers.load(std::memory_order_relaxed) && take())
                    look = 0;
                else
                    pause(look);
            std::unique_lock lock(mutex);
            sleeping++;
            awake.wait(lock, [&] { return turns != seen && number < helpers.load(std::memory_order_relaxed); });
            sleeping--;
            seen = turns;
        }
    }

    std::mutex busy, mutex;
    std::condition_variable awake;
    int started = 0, sleeping = 0;
    uint64_t turns = 0, phase = 0;
    std::atomic<int> helpers{0};
    alignas(64) std::atomic<uint64_t> open{0};
    alignas(64) std::atomic<int64_t> done{0};
    std::atomic<void (*)(void*, int64_t)> call{nullptr};
    std::atomic<void*> argument{nullptr};
};
