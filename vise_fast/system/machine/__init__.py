"""The machine a run is on: threads, memory, the allocator, clocks."""
