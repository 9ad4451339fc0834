"""A decoder in C++ for processors with AVX-512, compiled where it runs."""
