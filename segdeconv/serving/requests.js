// Requests to the server that sent the page.

export async function checked(request) {
  let response;
  try {
    response = await request;
  } catch {
    throw new Error("the server does not answer - is it still running?");
  }
  if (!response.ok) {
    const content = await response.json().catch(() => ({}));
    throw new Error(content.error || `the server answered with status ${response.status}`);
  }
  return response;
}
