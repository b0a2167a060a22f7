// Several callers at once, with teams of several sizes: every chunk is done once, and before `each` returns.
// Built and run by sanitize.py with a thread sanitizer.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "team.h"

int main() {
    static Team team;
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; caller++)
        callers.emplace_back([caller] {
            for (int turn_number = 0; turn_number < 300; turn_number++) {
                Team::Turn turn(team, 1 + (turn_number + caller) % 4);
                std::vector<int> seen(200);  // not atomic: the sanitizer sees a chunk that is done by two threads
                for (int count = 0; count <= 200; count += 7) {
                    turn.each(count, [&](int64_t i) { seen[i]++; });
                    for (int i = 0; i < 200; i++)
                        if (seen[i] != (i < count)) {
                            std::fprintf(stderr, "chunk %d of %d was done %d times\n", i, count, seen[i]);
                            std::exit(1);
                        } else {
                            seen[i] = 0;
                        }
                }
            }
        });
    for (auto& caller : callers) caller.join();
    std::_Exit(0);  // helpers may be asleep
}
