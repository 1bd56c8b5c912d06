"""The Hub and this machine: names, downloads, huggingface_hub's cache, uploads.

`resolve` says which folder a name means, `download` brings a model here; `client` speaks to the
Hub, `transfer` moves and checks bytes, `destination` says where they go; `layout` alone knows how
huggingface_hub's cache is laid out. Nothing here knows what the weights mean, and nothing prints.
"""
