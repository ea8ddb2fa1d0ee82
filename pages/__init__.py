"""The dashboard's pages: one script per question. ``app.py`` routes them."""
