def emit(a,b): return []
