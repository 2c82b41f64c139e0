"""Drawing of figures and pages: overlays, legends, panels, thumbnails, PNG files, HTML.

May import `errors`, `system`, `switches`, `config` and `classes`.
"""
