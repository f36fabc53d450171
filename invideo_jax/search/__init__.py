"""Search by words, by example and by sound over any folder of videos.

`opening.py` opens a model of several modalities; `index.py` keeps embeddings on disk; `indexing.py` brings them up to
date with the videos; `asking.py` turns queries into hits; `clips.py` decodes single hits again; `gallery.py` writes
them as one HTML file. `python -m invideo_jax.search` is the command.
"""
