int toy_resize(int from, int to);
