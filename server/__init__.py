"""The server: bundles behind OpenAI's interface, and a page. Needs the extra `serve`.

from coreinfer import runtime, server

app = server.create_app({"demo": runtime.load("build/demo-bundle")}, server.ServerConfig())
"""

from .app import create_app
from .config import ServerConfig
from .serving import serve

__all__ = ["ServerConfig", "create_app", "serve"]
