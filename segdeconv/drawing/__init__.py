"""Pictures and pages: overlays, legends, panels, thumbnails, PNG, HTML.

May import `errors`, `system`, `switches`, `config` and `classes`.
"""
