def render(r): return ""
