"""Live ranks: started, fed with jobs, watched and stopped. The one place of the engine that owns processes."""
