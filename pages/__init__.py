"""Pages of the dashboard, routed by ``app.py``."""
