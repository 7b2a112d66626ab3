// Keeps one comment on a pull request. Its first line, which nobody sees, is how it is found again.
const fs = require("fs");

const LIMIT = 65000; // GitHub refuses longer ones

module.exports = async ({ github, context, core }) => {
  const number = context.payload.pull_request?.number;
  if (!number) {
    core.notice("Not a pull request, so there is nothing to comment on.");
    return;
  }
  const marker = `<!-- swiftprune-bench: ${process.env.NAME} -->`;
  const run = `${context.serverUrl}/${context.repo.owner}/${context.repo.repo}/actions/runs/${context.runId}`;
  const end = `\n\nThe whole report is in the artifact \`${process.env.NAME}\` of [this run](${run}).\n`;
  const body = `${marker}\n${fs.readFileSync(process.env.FILE, "utf8")}`.slice(0, LIMIT - end.length) + end;
  try {
    const comments = await github.paginate(github.rest.issues.listComments, {
      ...context.repo,
      issue_number: number,
      per_page: 100,
    });
    const earlier = comments.find((comment) => comment.user?.type === "Bot" && comment.body?.startsWith(marker));
    if (earlier) {
      await github.rest.issues.updateComment({ ...context.repo, comment_id: earlier.id, body });
    } else {
      await github.rest.issues.createComment({ ...context.repo, issue_number: number, body });
    }
  } catch (error) {
    if (error.status !== 403) throw error;
    core.notice("No comment: the token may only read, as for pull requests from forks. The job's summary has the table.");
  }
};
