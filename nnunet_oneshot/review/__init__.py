"""A local page on which a person looks at labels, accepts, rejects, flags and corrects them.

`session` starts it, `server` answers the browser out of what a `desk` hands it, `decisions` writes to the dataset,
`corrections` takes labels back, `carry` spreads a corrected slice by SAM2, `volumes` makes files for the viewer, and
`viewer` finds NiiVue.
"""
