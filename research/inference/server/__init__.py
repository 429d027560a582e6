"""An HTTP server with OpenAI's routes for one engine."""

from research.inference.server.config import ServerConfig
from research.inference.server.serve import Server
from research.inference.server.text import ServedTokenizer

__all__ = ["ServedTokenizer", "Server", "ServerConfig"]
