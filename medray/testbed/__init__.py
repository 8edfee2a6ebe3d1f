"""A small world for demo, tests and replication: synthetic blood cells, three tiny vision-language models
and a tiny CLIP.
"""
