"""OpenAI's dialect: models, chat completions, completions and responses.

Source: the OpenAPI description of OpenAI's API, and what its Python client reads; fields of vLLM's
server that clients send beside them are in `bodies`.
"""

from phimlx.server.openai import absent, chat, completions, models, responses
from phimlx.server.openai.shapes import error_object

ROUTES = (
    *chat.ROUTES,
    *completions.ROUTES,
    *responses.ROUTES,
    *models.ROUTES,
    *absent.ROUTES,
)

__all__ = ["ROUTES", "error_object"]
