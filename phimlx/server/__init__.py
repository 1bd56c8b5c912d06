"""The HTTP server: OpenAI's, Anthropic's and Ollama's API over one engine.

A request passes `guard` (who may ask, and how much), a dialect (its body into an `Ask`), `service`
(model, queue, prompt) and `worker` (the thread that computes), and comes back through the dialect.
"""
